/* One process that is being filled: shared by pager_tasks.c (what there is to do) and pager_place.c (doing it).
 */
#ifndef ARCHITECT_PAGER_TASK_H
#define ARCHITECT_PAGER_TASK_H

#include "pager_tasks.h"

struct task {
	struct ranges ranges;
	struct pages *pages;
	size_t pages_index;
	uint64_t *missing; /* bit per page of the image; bits outside all ranges are 0 */
	uint64_t left;     /* bits set */
	uint64_t cursor;   /* address where filling goes on */
	uint64_t ahead;    /* first page of what the disk was last asked for, and when (0: never) */
	uint64_t asked_ahead;
	int hot_placed;    /* what earlier wakes asked for first is in */
};

/* The checkpoint in use, or NULL; and its processes, parallel to shared->tasks. Both are pager_tasks.c's. */
extern struct checkpoint *checkpoint;
extern struct task *tasks;

/* Ends the pager if error is not 0; its successor goes on. */
void or_die(int error);
uint64_t least(uint64_t a, uint64_t b);
int is_missing(const struct task *task, uint64_t page);
void clear_missing(struct task *task, uint64_t page);
/* How many pages from page on, fewer than limit, are all missing and readable. */
uint64_t run_length(const struct task *task, uint64_t page, uint64_t limit);
/* Places count missing pages, image page number `page` at address and so on. On any outcome but PLACED some
 * of them, from the first on, may have been placed. */
enum outcome place(unsigned index, uint64_t address, uint64_t page, uint64_t count);

#endif
