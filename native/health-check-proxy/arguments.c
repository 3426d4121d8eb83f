/* Reads the command line; called by main.c. */
#define _GNU_SOURCE
#include "arguments.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "asleep.h"
#include "bounds.h"
#include "say.h"

static const char usage[] =
	"usage: health-check-proxy --map NAME:SHADOWPORT:APPPORT...\n"
	"Answers health probes on SHADOWPORT for container NAME: through its own APPPORT while it is awake, from\n"
	"memory while it is hibernated.\n";

static const char shape[] = "give NAME:SHADOWPORT:APPPORT, as in web:18080:8080";

/* A port, or 0 if the text is none. */
static uint16_t read_port(const char *text)
{
	unsigned long port;
	size_t length = strlen(text);

	if (!length || length > 5 || strspn(text, "0123456789") != length)
		return 0;
	port = strtoul(text, NULL, 10);
	return port <= UINT16_MAX ? (uint16_t)port : 0;
}

static void read_mapping(char *value, struct mapping *mapping)
{
	char text[256], *shadow, *app;

	if (snprintf(text, sizeof text, "%s", value) >= (int)sizeof text)
		fail(2, "--map %.32s...: too long; %s", value, shape);
	shadow = strchr(value, ':');
	app = shadow ? strchr(shadow + 1, ':') : NULL;
	if (!app)
		fail(2, "--map %s: it has not three parts; %s", text, shape);
	*shadow++ = *app++ = 0;
	if (!*value || strlen(value) > CONTAINER_NAME_MAX || strspn(value, "abcdefghijklmnopqrstuvwxyz"
	    "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") != strlen(value))
		fail(2, "--map %s: NAME '%s' is no container's name; %s", text, value, shape);
	mapping->container = value;
	mapping->shadow_port = read_port(shadow);
	mapping->app_port = read_port(app);
	if (!mapping->shadow_port)
		fail(2, "--map %s: SHADOWPORT '%s' is no port; give one of 1 to 65535", text, shadow);
	if (!mapping->app_port)
		fail(2, "--map %s: APPPORT '%s' is no port; give one of 1 to 65535", text, app);
	if (mapping->shadow_port == mapping->app_port)
		fail(2, "--map %s: SHADOWPORT and APPPORT are the same; give the probes a port of their own", text);
}

static void refuse_double(const struct mapping *mappings, int number)
{
	for (int i = 0; i < number; i++)
		if (mappings[i].shadow_port == mappings[number].shadow_port)
			fail(2, "--map %s:%d:%d: SHADOWPORT %d is container %s's already; give each mapping its own",
			     mappings[number].container, mappings[number].shadow_port,
			     mappings[number].app_port, mappings[number].shadow_port, mappings[i].container);
}

int arguments_read(int argc, char **argv, struct mapping *mappings)
{
	int number = 0;

	for (int i = 1; i < argc; i++) {
		char *value = NULL;

		if (!strcmp(argv[i], "--help")) {
			fputs(usage, stdout);
			exit(0);
		} else if (!strcmp(argv[i], "--map")) {
			value = argv[++i];
		} else if (!strncmp(argv[i], "--map=", 6)) {
			value = argv[i] + 6;
		} else {
			fail(2, "%.200s: there is no such option; give --map NAME:SHADOWPORT:APPPORT", argv[i]);
		}
		if (!value)
			fail(2, "--map: its value is missing; %s", shape);
		if (number == MAPPINGS)
			fail(2, "--map %.200s: these are more than %d; give a pod no more", value, MAPPINGS);
		read_mapping(value, &mappings[number]);
		refuse_double(mappings, number);
		number++;
	}
	if (!number)
		fail(2, "--map: there is none; %s", shape);
	return number;
}
