# Built in layers that change less and less often from the bottom up: code comes last.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH

# gcc and the headers: Triton compiles its launchers at run time. Versions are the distribution's newest on purpose.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-venv python3.12-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /opt/venv

WORKDIR /worker
COPY requirements.txt .
RUN pip install -r requirements.txt

COPY diffusers_helper/ diffusers_helper/
COPY core/ core/
COPY handler.py test_input.json ./

# Weights come from the network volume or the hub's cache; both default to RunPod's volume.
ENV HF_HOME=/runpod-volume/huggingface-cache

CMD ["python", "handler.py"]
