/* Talking to the daemon and to a container's keeper; see peers.c. */
#ifndef ARCHITECT_PEERS_H
#define ARCHITECT_PEERS_H

#include <stddef.h>

struct request {
	const char *verb, *id;
	const char *bundle, *root; /* create only; NULL otherwise */
	const char *resources;     /* update: the resources that are asked for, as JSON; NULL otherwise */
	const char *process;       /* exec: the file that describes the process; NULL otherwise */
	int signal;                /* stop: its number; else 0 */
	int pid;                   /* create: the engine's monitor; created: the keeper; else 0 */
};

/* Sends one request to the daemon. Returns the open connection with the reply line in *reply, or -1 if
 * no daemon answers. The daemon holds the container awake for as long as the connection is open, in
 * this process or in one that inherited it. */
int daemon_ask(const struct request *request, char *reply, size_t room);

/* Connects to the keeper of a container. Returns a descriptor, or -1 if there is none alive. Answers are
 * awaited for a few seconds only: a paused container's keeper is frozen. */
int keeper_connect(const char *id);
/* Sends text, receives one reply. Returns 0, or -1 if the keeper went away. */
int keeper_ask(int keeper, const char *text, char *reply, size_t room);
/* Blocks until the keeper's end of the connection closes, which is the keeper's exit. */
void keeper_await_exit(int keeper);

#endif
