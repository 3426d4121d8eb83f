/* The userfaultfd orders that the pager gives; see uffd.c. All return 0 or more, or -errno. */
#ifndef ARCHITECT_UFFD_H
#define ARCHITECT_UFFD_H

#include <stdint.h>

/* Places a copy of bytes at address where nothing is yet. Returns the bytes placed, maybe fewer than length.
 * -EEXIST: a page is there already; -ENOENT: no registered area, or not all of it in one; -EAGAIN: events
 * must be read first; -ESRCH: the process has ended. */
int64_t uffd_copy(int fd, uint64_t address, const void *bytes, uint64_t length);
/* Places a page of zeros, the same way. */
int uffd_zero(int fd, uint64_t address);
/* Whoever waits for the page at address looks again. */
int uffd_wake(int fd, uint64_t address);
/* Whether the process behind fd has ended. Changes nothing in it. */
int uffd_has_ended(int fd);
/* Whether fd is a userfaultfd at all. */
int uffd_is_one(int fd);

#endif
