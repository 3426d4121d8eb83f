/* A keeper for the pager's tests; see keeping.c. Every function ends the test where it cannot go on. */
#ifndef ARCHITECT_TEST_KEEPING_H
#define ARCHITECT_TEST_KEEPING_H

#include <sys/types.h>

#include "../pager_shared.h"

enum { DEADLINE_MS = 60000 };

extern pid_t pager; /* the present one */
extern int images;  /* the working directory */

/* A keeper with a pager, for the images in the working directory. */
void begin_keeping(void);
/* Disarms, and looks for what the pagers left behind: no more than this many descriptors may be open. */
void end_keeping(unsigned descriptors);
unsigned open_descriptors(void);

void kill_pager(void);
/* Another one in place of the one that was killed. */
void succeed_pager(void);
/* Waits for a change of the pager's, or its end, which it answers with a successor. */
void hear_pager(int milliseconds);
/* Whether all orders have been taken up. */
int settled_orders(void);
void wait_for(enum pager_state wanted);
/* Orders the images here, and waits until they are armed. */
void arm(void);
void fail_with_status(const char *what);

/* Writes the checkpoint of that many programs into the working directory. */
void make_images(unsigned programs, unsigned seed, uint32_t pages);
/* Starts this program again as CRIU's side, in a process group of its own: restore_main (program.c) has the
 * arguments' meaning. input and output are for a puppet, or -1. */
pid_t start_restore(const char *programs, const char *threads, const char *steps, const char *seed,
		    const char *pages, const char *end, int input, int output);

/* The scenarios of instants.c. */
void greeting_instants(void);
void event_instants(void);
void closing_instants(void);
void refused(void);
void damaged(void);
void given_up(void);
void abandoned(void);
void killed_programs(void);

#endif
