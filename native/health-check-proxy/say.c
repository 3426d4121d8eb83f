/* Messages, the clock and memory, for all other modules. */
#define _GNU_SOURCE
#include "say.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static void say_values(const char *format, va_list values)
{
	char line[512];

	vsnprintf(line, sizeof line, format, values);
	fprintf(stderr, "health-check-proxy: %s\n", line);
}

void say(const char *format, ...)
{
	va_list values;

	va_start(values, format);
	say_values(format, values);
	va_end(values);
}

_Noreturn void fail(int status, const char *format, ...)
{
	va_list values;

	va_start(values, format);
	say_values(format, values);
	va_end(values);
	exit(status);
}

long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

void *allocate(void *old, unsigned long size)
{
	void *memory = realloc(old, size);

	if (!memory)
		fail(1, "no memory for %lu bytes: raise the memory limit of this container", size);
	return memory;
}
