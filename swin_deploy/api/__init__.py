"""The functions of `import swin_deploy`. They combine models, exporters, runtimes and calibration."""
