/* Reads the memory part of a CRIU checkpoint: which addresses each process had, and where the bytes are.
 *
 * Why it exists: the pager places pages into restored processes itself and needs no more of a checkpoint
 * than this. The pages files are mapped, not read, so that an armed pager costs next to nothing.
 *
 * Who calls it: pager.c, once when armed and again in a successor.
 *
 * The format: CRIU's images/pagemap.proto; the frame around messages: criu.org/Images (two magic words,
 * then length and message of each record). Wire format: protobuf.dev/programming-guides/encoding.
 */
#define _GNU_SOURCE
#include "pagemap.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { COMMON_MAGIC = 0x54564319, PAGEMAP_MAGIC = 0x56084025 };
/* Flags of a pagemap entry. */
enum { IN_PARENT = 1, LAZY = 2, PRESENT = 4 };
/* protobuf wire types. */
enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

struct reader {
	const unsigned char *at, *end;
	int failed;
};

static uint64_t read_varint(struct reader *in)
{
	uint64_t value = 0;

	for (int shift = 0; shift < 64 && in->at < in->end; shift += 7) {
		unsigned char byte = *in->at++;

		value |= (uint64_t)(byte & 127) << shift;
		if (!(byte & 128))
			return value;
	}
	in->failed = 1;
	return 0;
}

static void skip(struct reader *in, uint64_t bytes)
{
	if (bytes > (uint64_t)(in->end - in->at))
		in->failed = 1;
	else
		in->at += bytes;
}

/* Next field of a message. Only integers have a value that matters here; others read as 0. Returns the
 * field number, or 0 at the end or on an error. */
static uint64_t read_field(struct reader *in, uint64_t *value)
{
	uint64_t key;

	*value = 0;
	if (in->failed || in->at == in->end)
		return 0;
	key = read_varint(in);
	switch (key & 7) {
	case VARINT:
		*value = read_varint(in);
		break;
	case FIXED64:
		skip(in, 8);
		break;
	case BYTES:
		skip(in, read_varint(in));
		break;
	case FIXED32:
		skip(in, 4);
		break;
	default:
		in->failed = 1;
	}
	return in->failed ? 0 : key >> 3;
}

static uint32_t read_word(struct reader *in)
{
	uint32_t word = 0;

	if (in->end - in->at < 4) {
		in->failed = 1;
		return 0;
	}
	memcpy(&word, in->at, 4); /* CRIU writes host order and restores on the same architecture only */
	in->at += 4;
	return word;
}

/* Next record of an image file. Returns 0 at the end or on an error. */
static int read_record(struct reader *in, struct reader *record)
{
	uint32_t length;

	if (in->failed || in->at == in->end)
		return 0;
	length = read_word(in);
	*record = (struct reader){ in->at, in->at, 0 };
	skip(in, length);
	record->end = in->at;
	return !in->failed;
}

struct entry {
	uint64_t address, pages, flags;
};

static int read_entry(struct reader *record, struct entry *entry)
{
	uint64_t field, value, old_count = 0;

	memset(entry, 0, sizeof *entry);
	while ((field = read_field(record, &value)))
		switch (field) {
		case 1:
			entry->address = value;
			break;
		case 2:
			old_count = value;
			break;
		case 3:
			entry->flags |= value ? IN_PARENT : 0;
			break;
		case 4:
			entry->flags |= value;
			break;
		case 5:
			entry->pages = value;
			break;
		}
	if (!entry->pages)
		entry->pages = old_count; /* the 32-bit field; the 64-bit one is written only beyond it */
	return record->failed || entry->address % page_size() ||
	       entry->pages > (UINT64_MAX - entry->address) / page_size();
}

/* All entries of one pagemap; *needed is the number of pages that its pages file must hold. */
static int read_entries(struct reader *in, struct pagemap *map, uint64_t *needed)
{
	struct reader record;
	struct entry entry;

	*needed = 0;
	while (read_record(in, &record)) {
		uint64_t end, last = map->lazy.count ? map->lazy.at[map->lazy.count - 1].end : 0;

		if (read_entry(&record, &entry))
			return -EBADMSG;
		end = entry.address + entry.pages * page_size();
		if (entry.flags & LAZY && !(entry.flags & PRESENT))
			return -EOPNOTSUPP;
		if (entry.flags & LAZY && entry.pages) {
			if (entry.address < last)
				return -EBADMSG;
			if (ranges_insert(&map->lazy, (struct range){ entry.address, end, *needed }))
				return -ENOMEM;
			map->lazy_pages += entry.pages;
		}
		if (entry.flags & PRESENT)
			*needed += entry.pages;
	}
	return in->failed ? -EBADMSG : 0;
}

/* Maps the file NAME of directory. An empty file gives NULL and length 0. Returns 0 or -errno. */
static int map_file(int directory, const char *name, void **bytes, uint64_t *length)
{
	int fd = openat(directory, name, O_RDONLY | O_CLOEXEC), error = 0;
	struct stat file;

	*bytes = NULL;
	if (fd < 0)
		return -errno;
	if (fstat(fd, &file))
		error = -errno;
	*length = error ? 0 : (uint64_t)file.st_size;
	if (*length)
		*bytes = mmap(NULL, *length, PROT_READ, MAP_SHARED, fd, 0);
	if (*bytes == MAP_FAILED)
		error = -errno;
	else if (*length)
		/* The kernel would read a whole read-ahead window, megabytes on some disks, around each page. */
		madvise(*bytes, *length, MADV_RANDOM);
	close(fd);
	return error;
}

/* Index of pages-ID.img, mapped at the first use: several pagemaps may share one. Returns -errno too. */
static long find_pages(struct checkpoint *checkpoint, uint32_t id)
{
	struct pages pages = { .id = id }, *more;
	char name[32];
	uint64_t length;
	void *bytes;
	int error;

	for (size_t i = 0; i < checkpoint->pages_count; i++)
		if (checkpoint->pages[i].id == id)
			return (long)i;
	snprintf(name, sizeof name, "pages-%u.img", id);
	more = realloc(checkpoint->pages, (checkpoint->pages_count + 1) * sizeof *more);
	if (!more)
		return -ENOMEM;
	checkpoint->pages = more;
	error = map_file(checkpoint->directory, name, &bytes, &length);
	if (error)
		return error;
	pages.bytes = bytes;
	pages.length = length;
	pages.count = length / page_size();
	more[checkpoint->pages_count] = pages;
	return (long)checkpoint->pages_count++;
}

static int parse_pagemap(struct checkpoint *checkpoint, struct pagemap *map, struct reader *in)
{
	struct reader head;
	uint64_t field, value, id = 0, needed;
	long pages;
	int error;

	if (read_word(in) != COMMON_MAGIC || read_word(in) != PAGEMAP_MAGIC || !read_record(in, &head))
		return -EBADMSG;
	while ((field = read_field(&head, &value)))
		if (field == 1)
			id = value;
	if (head.failed || id > UINT32_MAX)
		return -EBADMSG;
	error = read_entries(in, map, &needed);
	if (error)
		return error;
	pages = find_pages(checkpoint, (uint32_t)id);
	if (pages < 0)
		return (int)pages;
	map->pages = (size_t)pages;
	return needed > checkpoint->pages[pages].count ? -ENODATA : 0;
}

static int load_pagemap(struct checkpoint *checkpoint, const char *name, int pid)
{
	struct pagemap map = { .pid = pid }, *more;
	struct reader in;
	uint64_t length;
	void *bytes;
	int error;

	more = realloc(checkpoint->pagemaps, (checkpoint->pagemap_count + 1) * sizeof *more);
	if (!more)
		return -ENOMEM;
	checkpoint->pagemaps = more;
	error = map_file(checkpoint->directory, name, &bytes, &length);
	if (error)
		return error;
	in = (struct reader){ bytes, (const unsigned char *)bytes + length, 0 };
	error = bytes ? parse_pagemap(checkpoint, &map, &in) : -EBADMSG;
	if (bytes)
		munmap(bytes, length);
	if (error) {
		ranges_free(&map.lazy);
		return error;
	}
	more[checkpoint->pagemap_count++] = map;
	return 0;
}

/* The PID of pagemap-PID.img; 0 for any other name, among them pagemap-shmem-ID.img (never lazy). */
static int pid_of(const char *name)
{
	static const char prefix[] = "pagemap-";
	char *end;
	long pid;

	if (strncmp(name, prefix, sizeof prefix - 1) || name[sizeof prefix - 1] < '1' ||
	    name[sizeof prefix - 1] > '9')
		return 0;
	pid = strtol(name + sizeof prefix - 1, &end, 10);
	return strcmp(end, ".img") || pid > INT_MAX ? 0 : (int)pid;
}

static int load_all(struct checkpoint *checkpoint)
{
	_Alignas(struct dirent) char buffer[4096];
	long length;

	if (lseek(checkpoint->directory, 0, SEEK_SET))
		return -errno;
	while ((length = syscall(SYS_getdents64, checkpoint->directory, buffer, sizeof buffer)) > 0)
		for (long at = 0; at < length;) {
			/* musl's struct dirent is the kernel's linux_dirent64. */
			const struct dirent *file = (const struct dirent *)(buffer + at);
			int pid = pid_of(file->d_name);
			int error = pid ? load_pagemap(checkpoint, file->d_name, pid) : 0;

			if (error)
				return error;
			at += file->d_reclen;
		}
	return length < 0 ? -errno : checkpoint->pagemap_count ? 0 : -ENOENT;
}

/* The pager's descriptors are the keeper's too: one that was open when the pager was killed would stay open
 * for the container's life, and keep a deleted image's space. So files are opened by a child that shares the
 * memory but has its own table of descriptors. Returns what work returns, or -errno. */
static int with_own_descriptors(int (*work)(void *), void *argument)
{
	enum { STACK = 64 << 10 };
	char *stack = malloc(STACK);
	int status = 0, pid;

	if (!stack)
		return -ENOMEM;
	/* CLONE_VFORK: waits for its end, so there is no concurrency in spite of the shared memory. */
	pid = clone(work, stack + STACK, CLONE_VM | CLONE_VFORK | SIGCHLD, argument);
	while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	free(stack);
	return pid < 0 ? -errno : WIFEXITED(status) ? -WEXITSTATUS(status) : -EINTR;
}

/* For with_own_descriptors: errors as exit status, which holds every errno. */
static int load_child(void *checkpoint)
{
	return -load_all(checkpoint);
}

int checkpoint_load(struct checkpoint *checkpoint, int directory)
{
	int error;

	*checkpoint = (struct checkpoint){ .directory = directory };
	error = with_own_descriptors(load_child, checkpoint);
	if (error)
		checkpoint_free(checkpoint);
	return error;
}

const struct pagemap *checkpoint_find(const struct checkpoint *checkpoint, int pid)
{
	for (size_t i = 0; i < checkpoint->pagemap_count; i++)
		if (checkpoint->pagemaps[i].pid == pid)
			return &checkpoint->pagemaps[i];
	return NULL;
}

struct piece {
	int directory;
	uint32_t id;
	off_t start, length;
};

static int drop_child(void *argument)
{
	const struct piece *piece = argument;
	char name[32];
	int fd;

	snprintf(name, sizeof name, "pages-%u.img", piece->id);
	fd = openat(piece->directory, name, O_RDONLY | O_CLOEXEC);
	return fd < 0 ? errno : posix_fadvise(fd, piece->start, piece->length, POSIX_FADV_DONTNEED);
}

void checkpoint_drop_cache(const struct checkpoint *checkpoint, size_t index, uint64_t first,
			   uint64_t count)
{
	const struct pages *pages = &checkpoint->pages[index];
	uint64_t start = first * page_size(), length = count * page_size();
	struct piece piece = { checkpoint->directory, pages->id, (off_t)start, 0 };

	if (start >= pages->length)
		return;
	if (length > pages->length - start)
		length = pages->length - start;
	/* Pages that are mapped stay in the cache whatever posix_fadvise(2) says. */
	madvise((void *)(pages->bytes + start), length, MADV_DONTNEED);
	piece.length = (off_t)length;
	with_own_descriptors(drop_child, &piece);
}

void checkpoint_free(struct checkpoint *checkpoint)
{
	for (size_t i = 0; i < checkpoint->pagemap_count; i++)
		ranges_free(&checkpoint->pagemaps[i].lazy);
	for (size_t i = 0; i < checkpoint->pages_count; i++) {
		struct pages *pages = &checkpoint->pages[i];

		if (pages->bytes)
			munmap((void *)pages->bytes, pages->length);
		free(pages->damaged);
	}
	free(checkpoint->pagemaps);
	free(checkpoint->pages);
	memset(checkpoint, 0, sizeof *checkpoint);
}

void pages_read_ahead(const struct pages *pages, uint64_t first, uint64_t count)
{
	uint64_t start = first * page_size(), length = count * page_size();

	if (length > pages->length - start)
		length = pages->length - start;
	madvise((void *)(pages->bytes + start), length, MADV_WILLNEED);
}

uint64_t pages_in_memory(const struct pages *pages, uint64_t first, uint64_t count)
{
	unsigned char there[64];
	uint64_t found = 0;

	if (count > sizeof there)
		count = sizeof there;
	if (mincore((void *)(pages->bytes + first * page_size()), count * page_size(), there))
		return count;
	while (found < count && there[found] & 1)
		found++;
	return found;
}

int pages_are_damaged(const struct pages *pages, uint64_t page)
{
	return pages->damaged && pages->damaged[page / 8] >> page % 8 & 1;
}

int pages_mark_damaged(struct pages *pages, uint64_t page)
{
	if (!pages->damaged)
		pages->damaged = calloc(1, pages->count / 8 + 1);
	if (!pages->damaged)
		return -ENOMEM;
	pages->damaged[page / 8] |= (unsigned char)(1 << page % 8);
	return 0;
}
