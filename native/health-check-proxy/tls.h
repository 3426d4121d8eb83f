/* The two ends of TLS: as a server with a certificate of its own making, as a client that verifies nothing. */
#ifndef PROXY_TLS_H
#define PROXY_TLS_H

#include <openssl/types.h>

/* NULL if the library refuses. */
SSL *tls_server(int fd);
/* name: for SNI, empty for none; http2: that is what to agree on (ALPN). */
SSL *tls_client(int fd, const char *name, int http2);

#endif
