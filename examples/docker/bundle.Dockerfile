# Image of `swin-deploy serve` with a bundle. Build it in the folder of the bundle (README.md beside this file).
ARG BASE=swin-deploy-serve:0.1.0
FROM ${BASE}
COPY . /bundle
