# prunelit on torch's CUDA libraries, which come with torch; the host brings the driver:
#     docker build -t prunelit .
#     docker run --rm --gpus all -v "$PWD:/work" prunelit fit --config quickstart
# On CPUs only, some gigabytes smaller; the address of the index of torch's CPU builds stands in torch's own guide:
#     docker build -t prunelit:cpu --build-arg TORCH_INDEX=ADDRESS .
# Extras, as wandb,nf4: --build-arg EXTRAS=wandb,nf4
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist . && cp constraints.txt /dist/

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=""
ARG EXTRAS=""
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" \
    pip install --no-cache-dir -c /dist/constraints.txt "$(echo /dist/prunelit-*.whl)${EXTRAS:+[${EXTRAS}]}" \
    && useradd --create-home --uid 1000 prunelit \
    && mkdir /work \
    && chown prunelit /work
USER 1000
WORKDIR /work
ENTRYPOINT ["prunelit"]
CMD ["--help"]
