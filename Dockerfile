# The bundle, a Node with libatomic, and the library that calls sendfile(2), nothing else: no shell, no package manager. Any base with glibc and
# libstdc++ will do for the last stage. `npm run build:image` builds it, also where no registry can be reached.
ARG BUILD_BASE=docker.io/library/node:26-bookworm
ARG BASE=gcr.io/distroless/cc-debian12

FROM ${BUILD_BASE} AS build
WORKDIR /build
COPY . .
RUN scripts/run scripts/build.ts \
    && mkdir -p image/opt/shoal/node_modules/@koromix image/usr/local/bin state \
    && cp -R dist image/opt/shoal/ \
    && cp node_modules/node-linux-*/bin/node image/opt/shoal/ \
    && mkdir image/opt/shoal/lib && cp -L "$(ldd image/opt/shoal/node | grep -o '/[^ ]*libatomic[^ ]*')" image/opt/shoal/lib/ \
    && cp -R node_modules/koffi image/opt/shoal/node_modules/ \
    && cp -R node_modules/@koromix/koffi-linux-* image/opt/shoal/node_modules/@koromix/ \
    && cp scripts/image-main.mjs image/usr/local/bin/shoal && chmod 755 image/usr/local/bin/shoal \
    && npm sbom --sbom-format cyclonedx --omit dev > image/opt/shoal/sbom.cdx.json

FROM ${BASE}
COPY --from=build /build/image /
# For those who run it as they are. On a node of Kubernetes it is root without any of root's rights, for containerd's socket.
COPY --from=build --chown=65532:65532 /build/state /var/lib/shoal
ENV XDG_DATA_HOME=/var/lib MALLOC_ARENA_MAX=2 LD_LIBRARY_PATH=/opt/shoal/lib
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/shoal"]
CMD ["serve"]
