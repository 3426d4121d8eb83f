/* A connection to the app. */
#ifndef PROXY_UPSTREAM_H
#define PROXY_UPSTREAM_H

#include <stdint.h>

#include "stream.h"

struct upstream {
	struct stream stream; /* fd is -1 when there is none */
	uint16_t port;
	int connected;
	unsigned next;      /* address to try */
	long long deadline; /* now_ms() by which the app has to have accepted */
};

/* Begins; what comes of it, upstream_connect() says. */
void upstream_start(struct upstream *upstream, uint16_t port);
/* 1 when connected, BLOCKED, or FAILED if the app accepts at none of the pod's addresses. */
int upstream_connect(struct upstream *upstream);
void upstream_close(struct upstream *upstream);

#endif
