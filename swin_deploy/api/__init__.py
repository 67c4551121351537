"""The functions of `import swin_deploy`: where models, exporters, runtimes and calibration meet."""
