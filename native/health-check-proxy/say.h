/* What the program has to say, and the time. */
#ifndef PROXY_SAY_H
#define PROXY_SAY_H

/* A line on stderr, with the program's name before it. */
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);

/* The same, then the end: with 1 if something failed, with 2 after wrong usage. */
__attribute__((format(printf, 2, 3))) _Noreturn void fail(int status, const char *format, ...);

/* CLOCK_MONOTONIC in milliseconds. */
long long now_ms(void);

/* Ends the program if there is no memory: everything is bounded, so that is never the load's doing. */
void *allocate(void *old, unsigned long size);

#endif
