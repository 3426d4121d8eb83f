/* The processes being filled: what each still misses, and handing it over; see pager_tasks.c. */
#ifndef ARCHITECT_PAGER_TASKS_H
#define ARCHITECT_PAGER_TASKS_H

#include "pagemap.h"

/* What came of an attempt to place pages. Ascending by how long it is worth to wait before the next. */
enum outcome {
	PLACED,     /* in, or no longer wanted */
	BUSY,       /* the process is changing its memory; its events come first */
	NO_MEMORY,  /* the container's limit, or descriptors have run out */
	UNREADABLE, /* the image is damaged there */
	TASK_GONE,  /* the process has ended */
	NOTHING,    /* there was nothing to place */
};

/* After a pager died: completes the shared records where it was interrupted. Before anything else here. */
void tasks_recover(void);
/* Begins with checkpoint, which must live until tasks_forget. Rebuilds what earlier pagers knew from the
 * shared records; there are none in a new restore. Returns 0 or -errno. */
int tasks_load(struct checkpoint *checkpoint);
/* Forgets all that tasks_load and the others built; records and descriptors stay. */
void tasks_forget(void);
/* Whether tasks_load has been called: without it nothing may be read from a userfaultfd. */
int tasks_loaded(void);

/* CRIU's process pid with its userfaultfd. Returns 0 or -errno: -ESRCH if no checkpoint is loaded, or it has
 * no such pid; the process is recorded all the same. */
int tasks_adopt(int pid, int fd);
/* Reads and applies the events that wait on the userfaultfd of task index. */
enum outcome tasks_read_events(unsigned index);
/* CRIU has connected: has the disk bring what earlier wakes asked for first, while CRIU is at work. */
void tasks_read_hot_ahead(void);
/* Serves the page faults that were read: the worst outcome, PLACED if nobody waits any more. */
enum outcome tasks_settle(void);
/* Places the next piece of what nobody has asked for yet: PLACED if it is worth to go on at once. */
enum outcome tasks_fill(void);
/* Closes the userfaultfds of all tasks that miss nothing. */
void tasks_close_complete(void);
/* Closes the userfaultfds of all tasks that have ended. */
void tasks_close_dead(void);
/* When a page was last asked for, CLOCK_MONOTONIC; 0: never. */
uint64_t tasks_last_fault_ns(void);
uint64_t monotonic_ns(void);

#endif
