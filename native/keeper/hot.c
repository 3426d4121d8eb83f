/* The working set of a wake: which pages were asked for in the first moments of earlier wakes.
 *
 * Why it exists: a program that has just been restored touches some hundred pages all over its memory
 * before its first reply, and each is a round trip between it and the pager, or to the disk. The next wake
 * touches much the same ones. So the disk is asked for them while CRIU is still at work, and they are
 * placed before the program runs. It is a hint and nothing else: a pager that dies forgets it.
 *
 * Called by pager_tasks.c only. */
#include "hot.h"

/* Wakes until the set is built anew. */
enum { WAKES = 16 };

static struct hot_page pages[HOT_MAX];
static unsigned count, wakes;

void hot_begin(void)
{
	if (++wakes % WAKES == 0)
		count = 0;
}

void hot_note(int32_t pid, uint64_t address)
{
	for (unsigned i = 0; i < count; i++)
		if (pages[i].address == address && pages[i].pid == pid)
			return;
	if (count < HOT_MAX)
		pages[count++] = (struct hot_page){ .pid = pid, .address = address };
}

const struct hot_page *hot_pages(unsigned *number)
{
	*number = count;
	return pages;
}
