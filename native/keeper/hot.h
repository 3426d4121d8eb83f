/* The pages that a program asks for first when it wakes; see hot.c. */
#ifndef ARCHITECT_HOT_H
#define ARCHITECT_HOT_H

#include <stdint.h>

enum { HOT_MAX = 512 };

struct hot_page {
	int32_t pid; /* in the checkpoint's own pid namespace */
	uint64_t address;
};

/* A restore begins: what follows is noted anew now and then, so that the set does not grow for ever. */
void hot_begin(void);
/* A process waited for this page soon after its restore. */
void hot_note(int32_t pid, uint64_t address);
/* All pages noted so far, in the order in which they were asked for; *count is set. */
const struct hot_page *hot_pages(unsigned *count);

#endif
