/* The memory part of a CRIU checkpoint: pagemap-PID.img and pages-N.img; see pagemap.c. */
#ifndef ARCHITECT_PAGEMAP_H
#define ARCHITECT_PAGEMAP_H

#include "ranges.h"

/* One pages-N.img: the bytes of all pages that its pagemaps call present, without any header. */
struct pages {
	uint32_t id;                /* N */
	const unsigned char *bytes; /* mapped; NULL when the file is empty */
	uint64_t length;            /* bytes in the file */
	uint64_t count;             /* whole pages in the file */
	unsigned char *damaged;     /* bit per page that could not be read; NULL while there is none */
};

/* One pagemap-PID.img. */
struct pagemap {
	int pid;             /* in the checkpoint's own pid namespace */
	size_t pages;        /* index into checkpoint.pages */
	struct ranges lazy;  /* what CRIU leaves to the page server */
	uint64_t lazy_pages; /* pages in lazy */
};

struct checkpoint {
	int directory; /* borrowed */
	struct pagemap *pagemaps;
	struct pages *pages;
	size_t pagemap_count, pages_count;
};

/* Reads every pagemap in directory and maps the pages. Opens no descriptor that a sudden death could leave
 * behind. Returns 0 or -errno: -EBADMSG for an image that is
 * no pagemap, -ENODATA for a pages file that is shorter than its pagemaps say, -EOPNOTSUPP for lazy
 * pages that are only in a parent checkpoint, -EINTR if it was killed. On error checkpoint is empty. */
int checkpoint_load(struct checkpoint *checkpoint, int directory);
/* The pagemap of pid, or NULL. */
const struct pagemap *checkpoint_find(const struct checkpoint *checkpoint, int pid);
/* Frees the page cache of count pages, from number first on, of checkpoint->pages[index]. They are read
 * from the disk again when used again. */
void checkpoint_drop_cache(const struct checkpoint *checkpoint, size_t index, uint64_t first,
			   uint64_t count);
void checkpoint_free(struct checkpoint *checkpoint);

/* Has the disk read count pages from number first on, without waiting for it. */
void pages_read_ahead(const struct pages *pages, uint64_t first, uint64_t count);
/* How many pages, the first of count from number first on, could be read without waiting for the disk. */
uint64_t pages_in_memory(const struct pages *pages, uint64_t first, uint64_t count);
/* Whether page number `page` is known to be unreadable. */
int pages_are_damaged(const struct pages *pages, uint64_t page);
/* Returns 0 or -ENOMEM. */
int pages_mark_damaged(struct pages *pages, uint64_t page);

#endif
