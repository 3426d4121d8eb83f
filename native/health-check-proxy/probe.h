/* One probe: a client's connection, and the app's connection that belongs to it. */
#ifndef PROXY_PROBE_H
#define PROXY_PROBE_H

#include "mapping.h"
#include "stream.h"
#include "upstream.h"

struct http1;
struct grpc;

enum probe_phase {
	FREE,
	RECOGNISING, /* nothing is known yet of what it speaks */
	SHAKING,     /* TLS with the client */
	ASKED_HTTP1,
	ASKED_GRPC,
	ONLY_TCP,    /* the client is gone, or was refused; the app has yet to show whether it accepts */
	LINGERING,   /* everything is said; the client has yet to close */
};

/* How the app's side is; only ever gets further. */
enum app_phase {
	APP_CONNECTING,
	APP_CONNECTED,
	APP_READY,   /* TLS is done too, where the client speaks it */
	APP_REFUSES, /* it does not accept, or not the TLS */
	APP_ASLEEP,  /* not to be asked: the memory answers */
};

struct probe {
	enum probe_phase phase;
	enum app_phase app_phase;
	struct mapping *mapping;
	struct stream client;
	struct upstream app;
	long long deadline; /* now_ms() at which it ends, whatever it does */
	long long wake;     /* now_ms() at which it wants to be called again */
	int late;           /* the deadline has passed once, and was answered for */
	int client_closed;  /* seen by epoll */
	char first[4];      /* the first bytes that the client sent */
	unsigned first_length;
	struct http1 *http1;
	struct grpc *grpc;
};

/* A client has connected. */
void probe_begin(struct probe *probe, struct mapping *mapping, int fd);
/* Gets as far as it can without waiting; frees the probe if that is the end. */
void probe_step(struct probe *probe);

/* For http1.c and grpc.c. */

/* Gets the app's side further. HTTP/2 is what is to be spoken in TLS, if there is TLS. */
enum app_phase probe_app(struct probe *probe, int http2);
/* Whether the app has been put to sleep by now. Looked at whenever the probe is called, so every 50 ms. */
int probe_app_sleeps(struct probe *probe);
/* For a further question on the same connection. */
void probe_app_again(struct probe *probe);
/* The client's first bytes that were read to see what it speaks. */
unsigned probe_take_first(struct probe *probe, char bytes[4]);

#endif
