# The bundle, a Node and the library that calls sendfile(2), nothing else. Any base with glibc and libstdc++ will do for either stage.
ARG BUILD_BASE=node:26-bookworm
ARG BASE=debian:bookworm-slim

FROM ${BUILD_BASE} AS build
WORKDIR /build
COPY . .
RUN scripts/run scripts/build.ts && npm sbom --sbom-format cyclonedx --omit dev > dist/sbom.cdx.json \
    && mv node_modules/node-linux-*/bin/node . \
    && mkdir -p native/@koromix && mv node_modules/koffi native/ && mv node_modules/@koromix/koffi-linux-* native/@koromix/

FROM ${BASE}
COPY --from=build /build/bin/shoal /opt/shoal/bin/
COPY --from=build /build/dist /opt/shoal/dist
COPY --from=build /build/node /opt/shoal/
COPY --from=build /build/native /opt/shoal/node_modules
ENTRYPOINT ["/opt/shoal/bin/shoal"]
CMD ["serve"]
