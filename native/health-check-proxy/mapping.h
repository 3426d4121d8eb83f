/* A shadow port, and the app's port that it stands for. */
#ifndef PROXY_MAPPING_H
#define PROXY_MAPPING_H

#include <stdint.h>

#include "answers.h"
#include "upstream.h"

struct mapping {
	const char *container;
	uint16_t shadow_port, app_port;
	int listener;           /* bound all the time; listens while `open` */
	int open;               /* as the app was when it was last seen awake; or it never was */
	int seen;               /* the app was once seen awake */
	uint32_t watched;       /* what epoll watches the listener for */
	int looking;            /* `look` is under way */
	struct upstream look;   /* whether the app accepts, while the port is closed */
	long long look_at;      /* now_ms() of the next look */
	long long closed_at;    /* now_ms() when the port was last closed, or the proxy began */
	struct answers answers;
	int failed;             /* the last answer was a failure */
	int failing;            /* descriptor of the name that says so, or -1; see failing.c */
};

/* Binds the port; ends the program with a message if it cannot. */
void mapping_begin(struct mapping *mapping);
/* Opens or closes the port: what a connect to the app has just shown. */
void mapping_accepts(struct mapping *mapping, int accepts);
/* Keeps an answer of the app, which is good or a failure. */
void mapping_answered(struct mapping *mapping, const struct question *question, int good, const void *head,
		      size_t head_length, const void *body, size_t body_length);
/* Looks whether the app accepts, if it is time for that or the look under way has got further. */
void mapping_look(struct mapping *mapping);
/* now_ms() at which mapping_look() wants to be called, or -1. */
long long mapping_due(const struct mapping *mapping);

#endif
