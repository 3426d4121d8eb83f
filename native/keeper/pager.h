/* The pager: a child of the keeper that hands the memory of a restored container to it page by page.
 *
 * After `criu restore --lazy-pages` the processes run without most of their memory; a page comes when it
 * is touched, all others follow in the background. The pager shares the keeper's table of descriptors, so
 * a pager that dies at any instant costs nothing but time: the keeper still holds every userfaultfd, and
 * the next pager goes on. A page that is missing makes its process wait; it never reads as zeros.
 *
 * Used by keeper.c, which is single-threaded:
 *   pager_init, pager_set_outside, pager_spawn at the start;
 *   pager_arm when a checkpoint is whole, then, once PAGER_ARMED, criu restore --lazy-pages in the
 *   working directory of pager_init;
 *   pager_reaped and pager_spawn when the pager ended.
 * The checkpoint must stay unchanged until PAGER_DONE. Whatever the keeper forks and does not exec must
 * close the keeper's descriptors: a forgotten copy of a userfaultfd would keep the kernel asking.
 */
#ifndef ARCHITECT_PAGER_H
#define ARCHITECT_PAGER_H

#include <stdint.h>
#include <sys/types.h>

enum pager_state {
	PAGER_IDLE,      /* nothing to do */
	PAGER_LOADING,   /* reads a checkpoint's pagemaps */
	PAGER_ARMED,     /* waits for CRIU at lazy-pages.socket in its working directory */
	PAGER_RESTORING, /* CRIU is connected */
	PAGER_FILLING,   /* CRIU is done and the processes run; pages are on their way */
	PAGER_DONE,      /* every page is in, or its process is gone */
	PAGER_FAILED,    /* the checkpoint cannot be used, or CRIU gave up before the processes ran */
	PAGER_STALLED,   /* processes wait for pages that cannot be read; arm again to retry */
};

/* Times are CLOCK_MONOTONIC; 0 while they have not come yet. */
struct pager_status {
	uint32_t state;         /* enum pager_state */
	int32_t error;          /* errno of the last trouble: why FAILED or STALLED, else a passing one */
	uint32_t orders_given;  /* pager_arm and pager_disarm calls so far */
	uint32_t orders_done;   /* those taken up; state speaks of the newest order once both are equal */
	uint32_t tasks;         /* processes that still wait for pages */
	uint32_t deaths;        /* pagers in a row that died without having placed a page */
	uint64_t pages_total;   /* pages to place, counted again for each process forked meanwhile */
	uint64_t pages_left;
	uint64_t faults;        /* pages asked for by a process that waited */
	uint64_t t_running_ns, t_done_ns;
};

/* Makes what pager and keeper share. Once, before anything else. CRIU's working directory is work, which
 * must stay open; -1: the checkpoint of the time. Returns 0, or -1 with errno. */
int pager_init(int work);
/* A successor starts in the keeper's cgroups, which are by then the container's: it leaves them by writing
 * "0" to these descriptors of cgroup.procs. They must stay open. */
void pager_set_outside(const int *fds, int count);
/* Starts a pager; where the last one stopped, if it died. Returns its pid, or -1 with errno. */
pid_t pager_spawn(void);
/* The pager ended: called after waitpid, before the next pager_spawn. wait_status is waitpid's. */
void pager_reaped(int wait_status);

/* Order: serve the checkpoint in directory images (duplicated; the caller may close it). Carried out as
 * soon as no living process depends on the checkpoint served before; if one does and the state is
 * PAGER_STALLED, the pages it waits for are retried from this directory. Returns 0, or -1 with errno
 * (EAGAIN: too many orders wait). */
int pager_arm(int images);
/* Order: forget the checkpoint. Carried out as soon as no living process depends on it. */
int pager_disarm(void);

/* Valid for ever, changes by itself. */
const struct pager_status *pager_status(void);
/* Becomes readable at each change of state and when an order is taken up. */
int pager_fd(void);
/* Makes pager_fd unreadable until the next change; call before pager_status. */
void pager_acknowledge(void);

#endif
