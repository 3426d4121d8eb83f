/* Every bound and time of the health-check-proxy; docs/reference.md promises them. */
#ifndef PROXY_BOUNDS_H
#define PROXY_BOUNDS_H

/* The mark of the proxy's own packets to the app (IP_TOS, IPV6_TCLASS): DSCP 23, of the pool that RFC 2474
 * leaves to local use. The gate (native/bpf) never takes a packet over lo with it for activity. */
enum { TRAFFIC_CLASS = 0x5c };

enum {
	MAPPINGS = 64,
	CONNECTIONS = 64, /* at once; one more is reset */
	BACKLOG = 64,
};

enum {
	LIFETIME_MS = 10000,    /* of a connection */
	LINGER_MS = 1000,       /* how long an answered client may take to close */
	CONNECT_MS = 1500,      /* for the app to accept; a SYN that its full queue dropped comes again after 1 s */
	ASLEEP_EVERY_MS = 50,   /* while an answer is awaited */
	LOOK_SOON_MS = 250,     /* until the next look whether an app accepts again */
	LOOK_SOON_FOR_MS = 30000,
	LOOK_LATER_MS = 1000,   /* after that, and while it sleeps */
};

/* Bytes. */
enum {
	REQUEST_MAX = 65536, /* a whole request; of HTTP/2 all that comes on a connection */
	HEAD_MAX = 16384,    /* first line and headers, of a request and of an answer */
	BODY_KEPT = 4096,    /* of an answer's body; an answer that has no more is passed on when it is whole */
	HEAD_KEPT = 4096,    /* of its status line and headers; if it has more, the status alone is kept */
	QUESTION_MAX = 1024, /* protocol, method, path and Host; the answer to a longer one is not kept */
};

enum { ANSWERS = 16 }; /* remembered for a mapping; the least recently used one goes */

#endif
