/* The programs that pager_test.c restores, and the checkpoint it claims they came from; see program.c. */
#ifndef ARCHITECT_TEST_PROGRAM_H
#define ARCHITECT_TEST_PROGRAM_H

#include <stdint.h>

enum { PAGE = 4096, FIRST_PID = 4242, FINISHED = 0x52535446 };
/* Where every program has its memory: PAGES pages from the checkpoint, then as many to move them to. */
#define MEMORY 0x10000000000ULL

/* Reports the place and ends the process with status 1. */
_Noreturn void broken(const char *file, int line, const char *what);
#define CHECK(truth) ((truth) ? (void)0 : broken(__FILE__, __LINE__, #truth))

/* The content of pages: number 0 is zeros, any other number its own sequence of words. */
void fill_page(void *page, uint32_t number);
int page_is(const void *page, uint32_t number);

/* Page numbers that the checkpoint of program `which` has at MEMORY, and which of them are lazy (1), present
 * but not lazy (2) or not in the checkpoint (0, content zeros). Made from seed; the caller frees. */
struct layout {
	uint32_t pages, *number;
	unsigned char *kind;
};
struct layout make_layout(uint32_t pages, unsigned which, unsigned seed);
/* Writes pagemap-PID.img and pages-N.img of program `which` into the current directory. */
void write_images(const struct layout *layout, unsigned which);

/* CRIU's side, in a process of its own: starts the programs, sends what CRIU sends from the current
 * directory, waits for them. Returns the exit status: 0 if all memory was right. */
int restore_main(int argc, char **argv);

/* What one puppet is told to do, by a pipe. It answers with one byte: 1 as expected, 0 not. */
struct command {
	/* r: page a has content b; f: fork, r in the child; d: discard a; a: the same in a thread, without
	 * waiting for it; u: unmap a; m: move a to b */
	char what;
	uint32_t a, b;
};

unsigned next_random(uint64_t *state, unsigned below);

#endif
