/* The programs that pager_test.c restores: processes with a userfaultfd on memory that a handwritten
 * checkpoint holds, doing to it what programs do while their pages are on the way.
 *
 * Why it exists: only the program itself can say whether each byte is right. It keeps a model of what every
 * page must hold and compares all of it, in threads and in forks.
 *
 * Who calls it: pager_test.c, which starts itself again as `restore`.
 */
#define _GNU_SOURCE
#include "program.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* In a model: nothing is mapped there. */
#define GONE UINT32_MAX
enum { PROGRAMS_MAX = 8, THREADS_MAX = 8 };

void broken(const char *file, int line, const char *what)
{
	fprintf(stderr, "%s:%d: not so: %s (errno %d: %s)\n", file, line, what, errno, strerror(errno));
	_exit(1);
}

/* splitmix64: any state gives a usable sequence. */
static uint64_t scramble(uint64_t value)
{
	value += 0x9e3779b97f4a7c15;
	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
	value = (value ^ value >> 27) * 0x94d049bb133111eb;
	return value ^ value >> 31;
}

unsigned next_random(uint64_t *state, unsigned below)
{
	*state = scramble(*state);
	return (unsigned)(*state >> 16) % below;
}

void fill_page(void *page, uint32_t number)
{
	uint64_t *words = page;

	for (unsigned i = 0; i < PAGE / 8; i++)
		words[i] = number ? scramble((uint64_t)number << 16 | i) : 0;
}

int page_is(const void *page, uint32_t number)
{
	const volatile uint64_t *words = page;

	for (unsigned i = 0; i < PAGE / 8; i++)
		if (words[i] != (number ? scramble((uint64_t)number << 16 | i) : 0))
			return 0;
	return 1;
}

/* ---- the checkpoint ------------------------------------------------------------------------------- */

struct layout make_layout(uint32_t pages, unsigned which, unsigned seed)
{
	struct layout layout = { pages, calloc(pages, 4), calloc(pages, 1) };
	uint64_t random = seed * 16 + which;
	uint32_t number = 1 + (which << 24);

	CHECK(layout.number && layout.kind);
	for (uint32_t page = 0; page < pages;) {
		static const unsigned char kinds[] = { 1, 1, 1, 1, 1, 2, 0, 1 };
		unsigned char kind = kinds[next_random(&random, sizeof kinds)];
		unsigned length = 1 + next_random(&random, kind == 1 ? 700 : 9);

		for (; length && page < pages; length--, page++) {
			layout.kind[page] = kind;
			layout.number[page] = kind ? number++ : 0;
		}
	}
	return layout;
}

static unsigned put_varint(unsigned char *to, uint64_t value)
{
	unsigned length = 0;

	for (; value > 127; value >>= 7)
		to[length++] = (unsigned char)(value | 128);
	to[length++] = (unsigned char)value;
	return length;
}

static void put_record(FILE *file, const unsigned char *record, uint32_t length)
{
	CHECK(fwrite(&length, 4, 1, file) == 1 && fwrite(record, length, 1, file) == 1);
}

static void put_entry(FILE *file, uint64_t address, uint32_t pages, unsigned flags)
{
	unsigned char record[64];
	unsigned length = 0;

	record[length++] = 1 << 3;
	length += put_varint(record + length, address);
	record[length++] = 2 << 3; /* nr_pages in the old field, as CRIU writes it */
	length += put_varint(record + length, pages);
	record[length++] = 4 << 3;
	length += put_varint(record + length, flags);
	put_record(file, record, length);
}

void write_images(const struct layout *layout, unsigned which)
{
	static const uint32_t magic[2] = { 0x54564319, 0x56084025 };
	unsigned char page[PAGE], head[] = { 1 << 3, (unsigned char)(which + 1) };
	char name[64];
	FILE *map, *pages;

	snprintf(name, sizeof name, "pagemap-%u.img", FIRST_PID + which);
	CHECK((map = fopen(name, "w")));
	snprintf(name, sizeof name, "pages-%u.img", which + 1);
	CHECK((pages = fopen(name, "w")));
	CHECK(fwrite(magic, sizeof magic, 1, map) == 1);
	put_record(map, head, sizeof head);
	for (uint32_t i = 0, first = 0; i < layout->pages; i++) {
		int kind = layout->kind[i];

		if (kind) {
			fill_page(page, layout->number[i]);
			CHECK(fwrite(page, PAGE, 1, pages) == 1);
		}
		if (i + 1 < layout->pages && layout->kind[i + 1] == kind)
			continue;
		if (kind) /* present, and lazy or not */
			put_entry(map, MEMORY + (uint64_t)first * PAGE, i + 1 - first, kind == 1 ? 6 : 4);
		first = i + 1;
	}
	CHECK(!fclose(map) && !fclose(pages));
}

/* ---- a process as CRIU leaves it ------------------------------------------------------------------ */

static void *address_of(uint32_t page)
{
	return (void *)(MEMORY + (uint64_t)page * PAGE);
}

static void map_pages(uint32_t page, uint32_t count, int protection)
{
	CHECK(mmap(address_of(page), (size_t)count * PAGE, protection,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED);
}

static int register_memory(uint32_t pages)
{
	struct uffdio_api api = { .api = UFFD_API,
				  .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
					      UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP };
	struct uffdio_register order = { .range = { MEMORY, (uint64_t)pages * PAGE },
					 .mode = UFFDIO_REGISTER_MODE_MISSING };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	CHECK(fd >= 0);
	CHECK(!ioctl(fd, UFFDIO_API, &api));
	CHECK(!ioctl(fd, UFFDIO_REGISTER, &order));
	return fd;
}

/* CRIU sends with the connection in the work of one process at a time: so do the programs. */
static void greet(int connection, int pid, int fd)
{
	char control[CMSG_SPACE(sizeof fd)] = { 0 }, byte = 0;
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1,
				  .msg_control = control, .msg_controllen = sizeof control };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(header), &fd, sizeof fd);
	CHECK(send(connection, &pid, sizeof pid, 0) == sizeof pid);
	CHECK(sendmsg(connection, &message, 0) == 1);
}

/* Memory as after a restore: lazy pages missing, the others in place. Two kinds of area side by side. */
static void become_restored(const struct layout *layout, unsigned which, int connection)
{
	uint32_t pages = layout->pages;
	int fd;

	map_pages(0, pages, PROT_READ | PROT_WRITE);
	CHECK(!madvise(address_of(pages / 3), (size_t)pages / 5 * PAGE, MADV_DONTDUMP));
	map_pages(pages, pages, PROT_NONE);
	for (uint32_t page = 0; page < pages; page++)
		if (layout->kind[page] == 2)
			fill_page(address_of(page), layout->number[page]);
	fd = register_memory(pages);
	greet(connection, (int)(FIRST_PID + which), fd);
	close(fd);
	close(connection);
}

/* ---- a program that does what programs do --------------------------------------------------------- */

/* One thread's part: pages [first, first + count) of the checkpoint, and as many to move them to. */
struct part {
	uint32_t first, count, spare;
	uint32_t *model; /* 2 * count page numbers: first.., then spare.. */
	uint64_t random;
	unsigned steps, next_number, depth;
};

static uint32_t page_of(const struct part *part, uint32_t slot)
{
	return slot < part->count ? part->first + slot : part->spare + slot - part->count;
}

static void verify_slot(const struct part *part, uint32_t slot)
{
	uint32_t page = page_of(part, slot), number = part->model[slot];

	if (number == GONE || page_is(address_of(page), number))
		return;
	fprintf(stderr, "pid %d depth %u: page %u has not content %u but %s\n", getpid(), part->depth, page,
		number, page_is(address_of(page), 0) ? "zeros" : "something else");
	_exit(1);
}

static void verify_all(const struct part *part)
{
	for (uint32_t slot = 0; slot < 2 * part->count; slot++)
		verify_slot(part, slot);
}

/* A run of slots that lie side by side in memory. */
static uint32_t pick(struct part *part, uint32_t *length)
{
	uint32_t slot = next_random(&part->random, 2 * part->count);
	uint32_t end = slot < part->count ? part->count : 2 * part->count;

	*length = 1 + next_random(&part->random, 24);
	if (*length > end - slot)
		*length = end - slot;
	return slot;
}

static void set_model(struct part *part, uint32_t slot, uint32_t length, uint32_t number)
{
	while (length--)
		part->model[slot++] = number;
}

static void discard(struct part *part, uint32_t slot, uint32_t length)
{
	/* Fails where something in between is not mapped; the pages before it are gone all the same. */
	for (; length; length--, slot++)
		if (part->model[slot] != GONE) {
			CHECK(!madvise(address_of(page_of(part, slot)), PAGE, MADV_DONTNEED));
			part->model[slot] = 0;
		}
}

static void discard_run(struct part *part, uint32_t slot, uint32_t length)
{
	for (uint32_t i = 0; i < length; i++)
		if (part->model[slot + i] == GONE) {
			discard(part, slot, length);
			return;
		}
	CHECK(!madvise(address_of(page_of(part, slot)), (size_t)length * PAGE, MADV_DONTNEED));
	set_model(part, slot, length, 0);
}

static void unmap(struct part *part, uint32_t slot, uint32_t length)
{
	CHECK(!munmap(address_of(page_of(part, slot)), (size_t)length * PAGE));
	set_model(part, slot, length, GONE);
}

static void map_anew(struct part *part, uint32_t slot, uint32_t length)
{
	map_pages(page_of(part, slot), length, PROT_READ | PROT_WRITE);
	set_model(part, slot, length, 0);
}

static void move(struct part *part, uint32_t from, uint32_t length)
{
	uint32_t room, to = pick(part, &room);
	void *source, *target;

	if (length > room)
		length = room;
	if (from < to + length && to < from + length)
		return;
	source = address_of(page_of(part, from));
	target = address_of(page_of(part, to));
	if (mremap(source, (size_t)length * PAGE, (size_t)length * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		   target) == target) {
		memcpy(part->model + to, part->model + from, length * sizeof *part->model);
		set_model(part, from, length, GONE);
		return;
	}
	/* The source is not one area (EFAULT). The kernel may have cleared the target by then, and moved
	 * the beginning of the source. */
	unmap(part, to, length);
	unmap(part, from, length);
}

static void write_pages(struct part *part, uint32_t slot, uint32_t length)
{
	for (; length; length--, slot++)
		if (part->model[slot] != GONE) {
			part->model[slot] = part->next_number++ | 0x80000000;
			fill_page(address_of(page_of(part, slot)), part->model[slot]);
		}
}

static void live(struct part *part);

static void have_child(struct part *part)
{
	int status;
	pid_t child;

	if (part->depth == 2)
		return;
	child = fork();
	CHECK(child >= 0);
	if (!child) {
		part->depth++;
		part->steps = 20;
		live(part);
		_exit(0);
	}
	/* Goes on beside the child for a while. */
	for (unsigned i = 0; i < 10; i++) {
		uint32_t length, slot = pick(part, &length);

		discard_run(part, slot, length);
	}
	CHECK(waitpid(child, &status, 0) == child && !status);
}

static void step(struct part *part)
{
	uint32_t length, slot = pick(part, &length);

	switch (next_random(&part->random, 16)) {
	case 0:
		unmap(part, slot, length);
		break;
	case 1:
		map_anew(part, slot, length);
		break;
	case 2:
	case 3:
		move(part, slot, length);
		break;
	case 4:
	case 5:
		discard_run(part, slot, length);
		break;
	case 6:
		write_pages(part, slot, length);
		break;
	case 7:
		if (!next_random(&part->random, 8))
			have_child(part);
		break;
	default:
		for (; length; length--)
			verify_slot(part, slot++);
	}
}

static void live(struct part *part)
{
	while (part->steps--)
		step(part);
	verify_all(part);
}

static void *thread_main(void *part)
{
	live(part);
	return NULL;
}

static void program_main(const struct layout *layout, unsigned threads, unsigned steps, unsigned seed)
{
	static struct part parts[THREADS_MAX];
	pthread_t ids[THREADS_MAX];
	uint32_t count = layout->pages / threads;

	for (unsigned i = 0; i < threads; i++) {
		struct part *part = &parts[i];

		*part = (struct part){ .first = i * count, .count = count, .steps = steps,
				       .spare = layout->pages + i * count,
				       .random = (uint64_t)seed << 8 | i, .next_number = i << 24 };
		CHECK((part->model = malloc(2 * count * sizeof *part->model)));
		memcpy(part->model, layout->number + part->first, count * sizeof *part->model);
		set_model(part, count, count, GONE);
	}
	for (unsigned i = 0; i < threads; i++)
		CHECK(!pthread_create(&ids[i], NULL, thread_main, &parts[i]));
	for (unsigned i = 0; i < threads; i++)
		CHECK(!pthread_join(ids[i], NULL));
}

/* ---- a program that is told ----------------------------------------------------------------------- */

static void *discard_thread(void *page)
{
	CHECK(!madvise(page, PAGE, MADV_DONTNEED));
	return NULL;
}

static int obey(const struct command *command)
{
	void *a = address_of(command->a);
	pthread_t thread;
	int status;
	pid_t child;

	switch (command->what) {
	case 'r':
		return page_is(a, command->b);
	case 'd':
		return !madvise(a, PAGE, MADV_DONTNEED);
	case 'u':
		return !munmap(a, PAGE);
	case 'm':
		return mremap(a, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, address_of(command->b)) !=
		       MAP_FAILED;
	case 'a':
		return !pthread_create(&thread, NULL, discard_thread, a) && !pthread_detach(thread);
	case 'f':
		child = fork();
		if (!child)
			_exit(!page_is(a, command->b));
		return waitpid(child, &status, 0) == child && !status;
	default:
		return 0;
	}
}

static void puppet_main(void)
{
	struct command command;

	while (read(STDIN_FILENO, &command, sizeof command) == sizeof command) {
		char answer = (char)obey(&command);

		CHECK(write(STDOUT_FILENO, &answer, 1) == 1);
	}
}

/* ---- CRIU's side ---------------------------------------------------------------------------------- */

struct wanted {
	unsigned programs, threads, steps, seed;
	uint32_t pages;
	int connection, go[2], greeted[2];
};

static pid_t start_program(const struct wanted *wanted, unsigned which)
{
	struct layout layout = make_layout(wanted->pages, which, wanted->seed);
	char byte = 0;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid) {
		CHECK(read(wanted->greeted[0], &byte, 1) == 1);
		return pid;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	become_restored(&layout, which, wanted->connection);
	CHECK(write(wanted->greeted[1], &byte, 1) == 1);
	close(wanted->go[1]);
	CHECK(!read(wanted->go[0], &byte, 1)); /* all run at the end of file */
	if (wanted->threads)
		program_main(&layout, wanted->threads, wanted->steps, wanted->seed);
	else
		puppet_main();
	_exit(0);
}

static int connect_pager(void)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX, .sun_path = "lazy-pages.socket" };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	CHECK(fd >= 0);
	CHECK(!connect(fd, (struct sockaddr *)&name, sizeof name));
	return fd;
}

/* restore PROGRAMS THREADS STEPS SEED PAGES finish|give-up; no threads: one puppet */
int restore_main(int argc, char **argv)
{
	struct wanted wanted;
	uint32_t all_run = FINISHED;
	int32_t zombie = -77;
	int result = 0, status;

	CHECK(argc == 7);
	prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves nothing behind */
	wanted.programs = (unsigned)atoi(argv[1]);
	wanted.threads = (unsigned)atoi(argv[2]);
	wanted.steps = (unsigned)atoi(argv[3]);
	wanted.seed = (unsigned)atoi(argv[4]);
	wanted.pages = (uint32_t)atoi(argv[5]);
	CHECK(wanted.programs <= PROGRAMS_MAX && wanted.threads <= THREADS_MAX);
	wanted.connection = connect_pager();
	CHECK(!pipe(wanted.go) && !pipe(wanted.greeted));
	for (unsigned i = 0; i < wanted.programs; i++)
		start_program(&wanted, i);
	CHECK(send(wanted.connection, &zombie, sizeof zombie, 0) == sizeof zombie);
	if (!strcmp(argv[6], "finish"))
		CHECK(send(wanted.connection, &all_run, sizeof all_run, 0) == sizeof all_run);
	close(wanted.connection);
	close(wanted.go[0]);
	if (!strcmp(argv[6], "finish"))
		close(wanted.go[1]);
	while (wait(&status) > 0)
		result |= status;
	return result ? 1 : 0;
}
