/* The command line. */
#ifndef PROXY_ARGUMENTS_H
#define PROXY_ARGUMENTS_H

#include "mapping.h"

/* Fills in the mappings and returns their number, at most MAPPINGS. Wrong usage ends the program with 2 and a
 * line that names option, value and fix. */
int arguments_read(int argc, char **argv, struct mapping *mappings);

#endif
