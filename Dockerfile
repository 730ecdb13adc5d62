# The bundle and a Node, nothing else. Any base with glibc and libstdc++ will do for either stage.
ARG BUILD_BASE=node:26-bookworm
ARG BASE=debian:bookworm-slim

FROM ${BUILD_BASE} AS build
WORKDIR /build
COPY . .
RUN scripts/run scripts/build.ts && mv node_modules/node-linux-*/bin/node .

FROM ${BASE}
COPY --from=build /build/bin/shoal /opt/shoal/bin/
COPY --from=build /build/dist /opt/shoal/dist
COPY --from=build /build/node /opt/shoal/
ENTRYPOINT ["/opt/shoal/bin/shoal"]
CMD ["serve"]
