/* Hands pages over: to a process that waits for one, with its neighbours, and what it is known to want first.
 *
 * Called by pager.c through pager_tasks.h, and by pager_tasks.c for filling.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>

#include "hot.h"
#include "pager_shared.h"
#include "pager_task.h"
#include "uffd.h"

/* Pages around a fault that come with it: what is nearby is used soon, and 256 KiB cost no more than two
 * more faults would. */
enum { AROUND = 64 };

static enum outcome trouble(struct task *task, uint64_t page, int error)
{
	switch (error) {
	case EAGAIN:
		return BUSY;
	case ESRCH:
		return TASK_GONE;
	case EFAULT:
	case EIO:
	case EHWPOISON:
		shared->status.error = EIO;
		or_die(pages_mark_damaged(task->pages, page));
		return UNREADABLE;
	default:
		/* ENOMEM above all. Whatever it is: trying again is always right, giving up never. */
		shared->status.error = error;
		return NO_MEMORY;
	}
}

/* CRIU registers one area after the other: one that is not there may still come. */
static int being_mapped(void)
{
	return shared->status.state == PAGER_RESTORING;
}

enum outcome place(unsigned index, uint64_t address, uint64_t page, uint64_t count)
{
	struct task *task = &tasks[index];
	int fd = shared->tasks[index].fd;
	uint64_t size = page_size(), step = count;

	while (count) {
		int64_t done = uffd_copy(fd, address, task->pages->bytes + page * size, step * size);

		if (done > 0)
			shared->progress++;
		if ((done == -ENOENT || done == -EINVAL) && step > 1) {
			/* One order must not reach across two areas of the address space. */
			step /= 2;
			continue;
		}
		if (done == -EEXIST || done == -ENOENT || done == -EINVAL) {
			/* There already, or no longer mapped: whoever waits shall look again. */
			uffd_wake(fd, address);
			if (done != -EEXIST && being_mapped())
				return PLACED;
			done = (int64_t)size;
		}
		if (done < 0)
			return trouble(task, page, (int)-done);
		for (; done > 0; done -= (int64_t)size, address += size, count--)
			clear_missing(task, page++);
		step = count;
	}
	return PLACED;
}

/* A page that the image does not have, or that the program has discarded since: zeros are right. */
static enum outcome place_zeros(unsigned index, uint64_t address)
{
	int fd = shared->tasks[index].fd, error = -uffd_zero(fd, address);

	switch (error) {
	case 0:
		return PLACED;
	case EAGAIN:
		return BUSY;
	case ESRCH:
		return TASK_GONE;
	case EEXIST:
	case ENOENT:
	case EINVAL:
		uffd_wake(fd, address);
		return PLACED;
	default:
		shared->status.error = error;
		return NO_MEMORY;
	}
}

/* How many pages right before page, at most limit, are all missing and readable. */
static uint64_t run_before(const struct task *task, uint64_t page, uint64_t limit)
{
	uint64_t length = 0;

	while (length < limit && run_length(task, page - length - 1, 1))
		length++;
	return length;
}

/* The faulting page first, so that its reader goes on after one copy, then its neighbours. */
static enum outcome serve_fault(unsigned index, uint64_t address)
{
	struct task *task = &tasks[index];
	const struct range *range;
	uint64_t size = page_size(), page, before, after;
	enum outcome outcome;

	address -= address % size;
	range = ranges_find(&task->ranges, address);
	page = range ? range->page + (address - range->start) / size : 0;
	if (!range || !is_missing(task, page))
		return place_zeros(index, address);
	if (pages_are_damaged(task->pages, page))
		return UNREADABLE;
	before = least(address / size % AROUND, (address - range->start) / size);
	after = least(AROUND - address / size % AROUND, (range->end - address) / size);
	if (being_mapped()) {
		before = 0;
		after = 1;
	}
	/* One read for all of it; what the mapping itself would read is a page at a time. */
	if (before + after > 1)
		pages_read_ahead(task->pages, page - before, before + after);
	outcome = place(index, address, page, run_length(task, page, after));
	if (is_missing(task, page))
		return outcome;
	before = run_before(task, page, before);
	if (before)
		place(index, address - before * size, page - before, before);
	return PLACED;
}

/* ---- the working set ------------------------------------------------------------------------------ */

/* Until how long after the program runs its faults count as those of a wake: until its first reply. */
enum { HOT_NS = 15000000 };

/* The image page of an address, or UINT64_MAX. */
static uint64_t image_page(const struct ranges *ranges, uint64_t address)
{
	const struct range *range = ranges_find(ranges, address);

	return range ? range->page + (address - range->start) / page_size() : UINT64_MAX;
}

/* Pages at the top of the stack: arguments and environment. Others read them through /proc/PID/cmdline, and the
 * kernel does not let them wait for a page: what is missing reads as empty. */
enum { TOP = 16 };

/* Image pages of the arguments, the first of *count; ranges ends with the stack. */
static uint64_t argument_pages(const struct ranges *ranges, uint64_t *count)
{
	const struct range *stack = ranges->count ? &ranges->at[ranges->count - 1] : NULL;
	uint64_t pages = stack ? (stack->end - stack->start) / page_size() : 0;

	*count = least(pages, TOP);
	return stack ? stack->page + pages - *count : 0;
}

static void place_arguments(unsigned index)
{
	const struct task *task = &tasks[index];
	const struct ranges *ranges = &task->ranges;
	uint64_t count, first = argument_pages(ranges, &count);

	for (uint64_t i = 0; i < count; i++)
		if (run_length(task, first + i, 1))
			place(index, ranges->at[ranges->count - 1].end - (count - i) * page_size(), first + i, 1);
}

void tasks_read_hot_ahead(void)
{
	unsigned count;
	const struct hot_page *hot = hot_pages(&count);

	for (size_t i = 0; checkpoint && i < checkpoint->pagemap_count; i++) {
		const struct pagemap *map = &checkpoint->pagemaps[i];
		uint64_t pages, first = argument_pages(&map->lazy, &pages);

		if (pages)
			pages_read_ahead(&checkpoint->pages[map->pages], first, pages);
	}

	for (unsigned i = 0; checkpoint && i < count; i++) {
		const struct pagemap *map = checkpoint_find(checkpoint, hot[i].pid);
		uint64_t page = map ? image_page(&map->lazy, hot[i].address) : UINT64_MAX;

		if (page != UINT64_MAX)
			pages_read_ahead(&checkpoint->pages[map->pages], page, 1);
	}
	hot_begin();
}

static void note_hot(unsigned index, uint64_t address)
{
	uint64_t running = shared->status.t_running_ns;

	if (shared->tasks[index].pid > 0 && (!running || monotonic_ns() - running < HOT_NS))
		hot_note(shared->tasks[index].pid, address - address % page_size());
}

/* Once, at the first fault of a process: its memory is registered by then, and it does not run yet. */
static void place_hot(unsigned index)
{
	struct task *task = &tasks[index];
	unsigned count;
	const struct hot_page *hot = hot_pages(&count);

	if (task->hot_placed || !being_mapped())
		return;
	task->hot_placed = 1;
	place_arguments(index);
	for (unsigned i = 0; i < count; i++) {
		uint64_t page;

		if (hot[i].pid != shared->tasks[index].pid)
			continue;
		page = image_page(&task->ranges, hot[i].address);
		/* What the disk has not brought yet is left to a fault: others wait meanwhile. */
		if (page != UINT64_MAX && run_length(task, page, 1) && pages_in_memory(task->pages, page, 1))
			place(index, hot[i].address, page, 1);
	}
}

static enum outcome settle(struct event_record *event)
{
	struct task_record *record = &shared->tasks[event->task];
	enum outcome outcome = PLACED;

	if (event->msg.event == UFFD_EVENT_PAGEFAULT && record->state == TASK_OPEN) {
		outcome = serve_fault(event->task, event->msg.arg.pagefault.address);
		note_hot(event->task, event->msg.arg.pagefault.address);
		place_hot(event->task);
	}
	if (outcome == PLACED || outcome == TASK_GONE)
		event->settled = 1;
	return outcome;
}

enum outcome tasks_settle(void)
{
	enum outcome worst = PLACED;

	for (uint32_t i = shared->settled; i < shared->event_count; i++) {
		enum outcome outcome = shared->events[i].settled ? PLACED : settle(&shared->events[i]);

		if (outcome > worst && outcome != TASK_GONE)
			worst = outcome;
	}
	while (shared->settled < shared->event_count && shared->events[shared->settled].settled)
		COMMIT(shared->settled, shared->settled + 1);
	return worst;
}
