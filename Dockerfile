# From what changes least to what changes most: system, weights, dependencies, code.
#
#   docker build -t framepack .                                               weights from a volume or the hub
#   docker build -t framepack --build-arg BAKE_MODELS=i2v --build-arg RUN_AS=worker .         weights inside
#
# More in docs/deploy.md.

# CUDA's version is that of torch's wheel, which brings cuBLAS, cuDNN and NCCL itself: the `base` flavour has the
# CUDA runtime, `runtime` would add a second copy of the rest. Its forward-compatibility package lets data-centre
# GPUs do with older drivers.
ARG CUDA_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04

FROM ${CUDA_IMAGE} AS system
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1
# gcc and the headers: Triton compiles its launchers at run time. tini: while the models load, Python as process 1
# would not hear SIGTERM. Versions are the distribution's newest on purpose.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --create-home worker


# Only what fetching needs, so that nothing else fetches 43 GB again.
FROM system AS weights
RUN pip install "huggingface_hub>=2,<3" "safetensors>=0.6,<1"
WORKDIR /fetch
COPY core/__init__.py core/errors.py core/settings.py core/
COPY core/weights/__init__.py core/weights/files.py core/weights/hub.py core/weights/profiles.py core/weights/
COPY builder/__init__.py builder/fetch_models.py builder/
# none, i2v, f1 or both
ARG BAKE_MODELS=none
RUN mkdir /models \
    && if [ "$BAKE_MODELS" != none ]; then python -m builder.fetch_models --models "$BAKE_MODELS" --to /models; fi


FROM system
COPY --from=weights /models /models

WORKDIR /worker
COPY requirements.txt .
ARG TORCH_INDEX_URL
RUN PIP_INDEX_URL="$TORCH_INDEX_URL" pip install "$(grep '^torch==' requirements.txt)"
RUN pip install -r requirements.txt

COPY builder/__init__.py builder/fetch_models.py builder/
COPY diffusers_helper/ diffusers_helper/
COPY core/ core/
COPY handler.py runpod_posts.py test_input.json ./

ENV HF_HOME=/runpod-volume/huggingface-cache \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TRITON_CACHE_DIR=/tmp/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    OUTPUT_DIR=/tmp/outputs

# RunPod mounts a network volume as root's, and only root can fill it. With the weights inside nothing but /tmp is
# written, and `worker` will do.
ARG RUN_AS=root
USER ${RUN_AS}

ENTRYPOINT ["tini", "--"]
CMD ["python", "handler.py"]
