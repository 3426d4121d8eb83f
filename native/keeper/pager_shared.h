/* What outlives a pager: memory shared by the keeper and all the pagers it starts; see pager.c.
 *
 * A pager can be killed between any two instructions, so every piece of progress is one store, made after
 * all that it stands for. System calls write straight into this memory: what the kernel has handed out
 * (a descriptor, an event) is on record before the pager could lose it.
 *
 * One process writes at a time: the pager, or the keeper while there is none. Orders go the other way.
 */
#ifndef ARCHITECT_PAGER_SHARED_H
#define ARCHITECT_PAGER_SHARED_H

#include <linux/userfaultfd.h>
#include <sys/socket.h>

#include "pager.h"

enum { TASKS_MAX = 1 << 16, EVENTS_MAX = 1 << 20, ORDERS_MAX = 8 };

enum task_state { TASK_OPEN, TASK_CLOSING, TASK_CLOSED };

/* A process with a userfaultfd: one of CRIU's, or a fork of one while pages were missing. */
struct task_record {
	int32_t pid;    /* as CRIU said it; 0 for a fork */
	int32_t fd;     /* its userfaultfd; meaningless once TASK_CLOSED */
	uint32_t state; /* enum task_state */
};

/* One event as read(2) delivered it. 64 bytes, so that none reaches across two pages: the store to `task`
 * before the read brings the page in, and the kernel then cannot fail to deliver what it took. */
struct event_record {
	uint32_t task;    /* index; stored before the read */
	uint32_t settled; /* a page fault that nobody waits for any more */
	uint32_t child;   /* a fork: index of its task + 1; 0 until there is one */
	uint32_t unused;
	struct uffd_msg msg; /* msg.event is 0 until the read */
	uint64_t padding[2];
};
_Static_assert(sizeof(struct event_record) == 64, "an event must not reach across pages");

/* What CRIU says of one process: its pid, then its userfaultfd. */
struct greeting {
	int32_t pid; /* 0: not yet read */
	char byte;   /* travels with the descriptor */
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
};

enum order_kind { ORDER_ARM, ORDER_DISARM };

struct order {
	uint32_t kind;
	int32_t directory; /* ORDER_ARM; the pager's from then on */
};

struct pager_shared {
	struct pager_status status;
	struct order orders[ORDERS_MAX];    /* number n is at n % ORDERS_MAX */
	int32_t work;                       /* CRIU's working directory; -1: the present checkpoint's */
	int32_t directory;                  /* of the present checkpoint, or -1 */
	int32_t listener, connection;       /* or -1 */
	struct greeting greeting;
	uint64_t progress, progress_at_death; /* something that grows whenever a pager achieves anything */
	uint32_t task_count, event_count;
	uint32_t settled;                   /* events below need no more attention */
	_Alignas(4096) struct task_record tasks[TASKS_MAX];
	_Alignas(4096) struct event_record events[EVENTS_MAX];
};

extern struct pager_shared *shared;

/* The one way to store what a successor relies on: after everything written so far. */
#define COMMIT(place, value) __atomic_store_n(&(place), (value), __ATOMIC_RELEASE)

#endif
