/* The userfaultfd orders that the pager gives.
 *
 * Why it exists: these ioctls report errors in two places and have no plain question to ask; this keeps it
 * out of pager_tasks.c, which calls it. Source: ioctl_userfaultfd(2) and the kernel's fs/userfaultfd.c.
 */
#include "uffd.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#include "ranges.h"

/* An address that the ioctls accept for any process, mapped or not. */
#define NOWHERE (1ULL << 32)

int64_t uffd_copy(int fd, uint64_t address, const void *bytes, uint64_t length)
{
	struct uffdio_copy order = { .dst = address, .src = (uintptr_t)bytes, .len = length };

	if (!ioctl(fd, UFFDIO_COPY, &order))
		return (int64_t)length;
	return order.copy > 0 ? order.copy : -errno;
}

int uffd_zero(int fd, uint64_t address)
{
	struct uffdio_zeropage order = { .range = { address, page_size() } };

	return ioctl(fd, UFFDIO_ZEROPAGE, &order) ? -errno : 0;
}

int uffd_wake(int fd, uint64_t address)
{
	struct uffdio_range page = { address, page_size() };

	return ioctl(fd, UFFDIO_WAKE, &page) ? -errno : 0;
}

int uffd_has_ended(int fd)
{
	/* Anonymous memory refuses this order, but the end of the process is noticed before that. */
	struct uffdio_continue order = { .range = { NOWHERE, page_size() } };

	return ioctl(fd, UFFDIO_CONTINUE, &order) && errno == ESRCH;
}

int uffd_is_one(int fd)
{
	return !uffd_wake(fd, NOWHERE);
}
