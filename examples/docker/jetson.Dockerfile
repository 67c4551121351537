# Image of `swin-deploy` for Jetson Orin with JetPack 6. Build it on the Jetson, in the root of the repository.
ARG L4T=r36.4.0

FROM nvcr.io/nvidia/l4t-jetpack:${L4T}
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY calib calib
COPY exporters exporters
COPY runtimes runtimes
COPY swin_deploy swin_deploy
# TensorRT 10.3 and CUDA 12.6 are in the base image, which is why the environment sees its packages.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv=3.10.* \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/swin-deploy \
    && /opt/swin-deploy/bin/pip install --no-cache-dir ".[jetson,serve]" \
    && useradd --system --uid 10001 --groups video --home-dir /nonexistent swin
ENV PATH=/opt/swin-deploy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/tmp/cache
USER 10001
ENTRYPOINT ["swin-deploy"]
CMD ["doctor"]
