/* Sorted sets of address ranges: which addresses of a process come from which pages of its image.
 *
 * Why it exists: a program may move, unmap and discard memory (mremap, munmap, madvise) before its pages
 * are in, so the map from address to image page changes while the pager works.
 *
 * Who calls it: pagemap.c builds a set from CRIU's image, pager_tasks.c changes copies of it.
 */
#include "ranges.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint64_t page_size(void)
{
	static uint64_t size;

	if (!size)
		size = (uint64_t)sysconf(_SC_PAGESIZE);
	return size;
}

size_t ranges_search(const struct ranges *set, uint64_t address)
{
	size_t low = 0, high = set->count;

	while (low < high) {
		size_t middle = (low + high) / 2;

		if (set->at[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

const struct range *ranges_find(const struct ranges *set, uint64_t address)
{
	size_t index = ranges_search(set, address);

	return index < set->count && set->at[index].start <= address ? &set->at[index] : NULL;
}

static int insert_at(struct ranges *set, size_t index, struct range range)
{
	if (set->count == set->room) {
		size_t room = set->room ? set->room * 2 : 64;
		struct range *larger = realloc(set->at, room * sizeof *larger);

		if (!larger)
			return -ENOMEM;
		set->at = larger;
		set->room = room;
	}
	memmove(set->at + index + 1, set->at + index, (set->count - index) * sizeof range);
	set->at[index] = range;
	set->count++;
	return 0;
}

int ranges_insert(struct ranges *set, struct range range)
{
	size_t index = ranges_search(set, range.start);
	struct range *before = index ? &set->at[index - 1] : NULL;

	/* CRIU splits its entries at area boundaries and flag changes that do not matter here. */
	if (before && before->end == range.start &&
	    before->page + (before->end - before->start) / page_size() == range.page) {
		before->end = range.end;
		return 0;
	}
	return insert_at(set, index, range);
}

/* Sees to it that no range reaches across address. */
static int split(struct ranges *set, uint64_t address)
{
	size_t index = ranges_search(set, address);
	struct range upper;

	if (index == set->count || set->at[index].start >= address)
		return 0;
	upper = set->at[index];
	upper.page += (address - upper.start) / page_size();
	upper.start = address;
	set->at[index].end = address;
	return insert_at(set, index + 1, upper);
}

int ranges_take(struct ranges *set, uint64_t start, uint64_t end, struct ranges *taken)
{
	size_t first, last;

	if (start >= end)
		return 0;
	if (split(set, start) || split(set, end))
		return -ENOMEM;
	first = ranges_search(set, start);
	for (last = first; last < set->count && set->at[last].start < end; last++)
		if (ranges_insert(taken, set->at[last]))
			return -ENOMEM;
	memmove(set->at + first, set->at + last, (set->count - last) * sizeof *set->at);
	set->count -= last - first;
	return 0;
}

int ranges_copy(struct ranges *copy, const struct ranges *set)
{
	if (!set->count)
		return 0;
	copy->at = malloc(set->count * sizeof *copy->at);
	if (!copy->at)
		return -ENOMEM;
	memcpy(copy->at, set->at, set->count * sizeof *copy->at);
	copy->count = copy->room = set->count;
	return 0;
}

void ranges_free(struct ranges *set)
{
	free(set->at);
	memset(set, 0, sizeof *set);
}
