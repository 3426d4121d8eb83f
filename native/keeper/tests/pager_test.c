/* Tests of the pager with real processes: a keeper that restores programs from a handwritten checkpoint and
 * kills its pagers, at random and at each instant that the pager's records distinguish.
 *
 * Why it exists: the pager's promise (no page lost, none stale, whatever dies) is about the kernel's
 * userfaultfd as much as about the pager; only real processes show it. The programs check every byte.
 *
 * Who calls it: tests/unit/test_pager.py, one scenario a run, in an empty directory that it becomes:
 *   pager_test DIRECTORY SCENARIO [ARGUMENTS]
 * Status: 0 passed, 77 not possible here (the reason is on stdout), else failed. By hand, with a real CRIU:
 *   pager_test DIRECTORY serve [KILLS] -- criu restore --lazy-pages ...   (DIRECTORY has the images)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../pager_tasks.h"
#include "keeping.h"
#include "program.h"

enum { NOT_POSSIBLE = 77 };

/* ---- random deaths -------------------------------------------------------------------------------- */

static void sleep_until_killed(uint64_t *random, unsigned most_us)
{
	struct timespec pause = { 0, (long)next_random(random, most_us) * 1000 };

	nanosleep(&pause, NULL);
}

/* Kills pagers at random instants while the programs run; then lets one finish. */
static void kill_many(unsigned kills, unsigned seed)
{
	uint64_t random = seed ^ 0x5ca1ab1e;

	uint32_t before = UINT32_MAX;

	for (; kills && pager_status()->state != PAGER_DONE; kills--) {
		/* Too many deaths before the programs run fail the restore: once in each of those states. */
		while (pager_status()->state == before && before < PAGER_FILLING)
			hear_pager(10);
		before = pager_status()->state;
		sleep_until_killed(&random, next_random(&random, 2) ? 3000 : 300);
		kill_pager();
		if (!next_random(&random, 4))
			sleep_until_killed(&random, 3000);
		succeed_pager();
		/* Five deaths too fast for any progress are allowed to stall it; not to lose anything. */
		if (pager_status()->state == PAGER_STALLED && settled_orders())
			CHECK(!pager_arm(images));
	}
	/* Given up by the last pagers' deaths, or never taken up. */
	while (!settled_orders())
		hear_pager(10);
	if (pager_status()->state == PAGER_STALLED)
		CHECK(!pager_arm(images));
	if (kills)
		printf("all in before the last %u kills\n", kills);
}

/* churn SEED KILLS PROGRAMS THREADS STEPS PAGES */
static void churn(char **argument)
{
	unsigned seed = (unsigned)atoi(argument[0]), kills = (unsigned)atoi(argument[1]), descriptors;
	int status;
	pid_t restore;

	make_images((unsigned)atoi(argument[2]), seed, (uint32_t)atoi(argument[5]));
	begin_keeping();
	descriptors = open_descriptors();
	arm();
	restore = start_restore(argument[2], argument[3], argument[4], argument[0], argument[5], "finish", -1,
				-1);
	kill_many(kills, seed);
	wait_for(PAGER_DONE);
	CHECK(waitpid(restore, &status, 0) == restore);
	CHECK(!status);
	printf("%lu faults, %lu pages left, %.1f ms\n", (unsigned long)pager_status()->faults,
	       (unsigned long)pager_status()->pages_left,
	       (double)(pager_status()->t_done_ns - pager_status()->t_running_ns) / 1e6);
	end_keeping(descriptors);
}

/* ---- a real restore, by hand ---------------------------------------------------------------------- */

static void print_memory(const char *when)
{
	char name[64], line[256];
	FILE *file;

	snprintf(name, sizeof name, "/proc/%d/smaps_rollup", pager);
	file = fopen(name, "r");
	printf("%s:", when);
	while (file && fgets(line, sizeof line, file))
		if (!strncmp(line, "Rss:", 4) || !strncmp(line, "Pss:", 4) || !strncmp(line, "Private_D", 9)) {
			line[strcspn(line, "\n")] = 0;
			printf(" %s", line);
		}
	printf("\n");
	if (file)
		fclose(file);
}

static double milliseconds_since(uint64_t start)
{
	return (double)(monotonic_ns() - start) / 1e6;
}

/* serve [KILLS] -- COMMAND: pager for the images here; prints the figures. */
static void serve(char **argument)
{
	unsigned kills = strcmp(*argument, "--") ? (unsigned)atoi(*argument++) : 0;
	const struct pager_status *status;
	uint64_t start;
	pid_t restore;
	int result;

	begin_keeping();
	start = monotonic_ns();
	arm();
	printf("armed after %.2f ms\n", milliseconds_since(start));
	print_memory("armed");
	fflush(stdout);
	start = monotonic_ns();
	restore = fork();
	CHECK(restore >= 0);
	if (!restore) {
		execvp(argument[1], argument + 1);
		_exit(126);
	}
	kill_many(kills, 1);
	CHECK(waitpid(restore, &result, 0) == restore);
	printf("restore command ended with status %d after %.1f ms\n", result, milliseconds_since(start));
	fflush(stdout);
	wait_for(PAGER_DONE);
	status = pager_status();
	printf("processes ran %.1f ms after the start; all pages in %.1f ms later; %lu pages, %lu faults\n",
	       (double)(status->t_running_ns - start) / 1e6,
	       (double)(status->t_done_ns - status->t_running_ns) / 1e6, (unsigned long)status->pages_total,
	       (unsigned long)status->faults);
	print_memory("done");
	kill_pager();
}

/* ---- main ----------------------------------------------------------------------------------------- */

static void probe(void)
{
	struct uffdio_api api = { .api = UFFD_API,
				  .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && !ioctl(fd, UFFDIO_API, &api)) {
		close(fd);
		return;
	}
	printf("userfaultfd with fork events: %s\n", strerror(errno));
	exit(NOT_POSSIBLE);
}

static const struct {
	const char *name;
	void (*run)(void);
} instants[] = {
	{ "greeting", greeting_instants }, { "events", event_instants },   { "closing", closing_instants },
	{ "refused", refused },            { "damaged", damaged },         { "given-up", given_up },
	{ "abandoned", abandoned },        { "killed", killed_programs },
};

int main(int argc, char **argv)
{
	const char *scenario = argc > 2 ? argv[2] : "";

	if (argc > 1 && !strcmp(argv[1], "restore"))
		return restore_main(argc - 1, argv + 1);
	if (argc < 3 || chdir(argv[1]))
		return 2;
	probe();
	if (!strcmp(scenario, "churn") && argc == 9) {
		churn(argv + 3);
		return 0;
	}
	if (!strcmp(scenario, "serve") && argc > 3) {
		serve(argv + 3);
		return 0;
	}
	for (unsigned i = 0; i < sizeof instants / sizeof *instants; i++)
		if (!strcmp(scenario, instants[i].name)) {
			instants[i].run();
			return 0;
		}
	return 2;
}
