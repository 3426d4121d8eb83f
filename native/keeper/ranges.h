/* Sorted sets of address ranges, each backed by consecutive pages of one image; see ranges.c. */
#ifndef ARCHITECT_RANGES_H
#define ARCHITECT_RANGES_H

#include <stddef.h>
#include <stdint.h>

/* Addresses [start, end), a whole number of pages; the page at start is page number `page` of the image. */
struct range {
	uint64_t start, end, page;
};

/* Ascending by start, never overlapping. All zero is the empty set. */
struct ranges {
	struct range *at;
	size_t count, room;
};

/* Bytes a page, of the running kernel; CRIU's images count in the same unit. */
uint64_t page_size(void);

/* The range that holds address, or NULL. */
const struct range *ranges_find(const struct ranges *set, uint64_t address);
/* Index of the first range that ends after address; set->count when there is none. */
size_t ranges_search(const struct ranges *set, uint64_t address);
/* Adds a range that overlaps no other. Returns 0 or -ENOMEM. */
int ranges_insert(struct ranges *set, struct range range);
/* Takes [start, end) out of set; what was there is added to taken. Returns 0 or -ENOMEM. */
int ranges_take(struct ranges *set, uint64_t start, uint64_t end, struct ranges *taken);
/* Makes copy, which must be empty, equal to set. Returns 0 or -ENOMEM. */
int ranges_copy(struct ranges *copy, const struct ranges *set);
void ranges_free(struct ranges *set);

#endif
