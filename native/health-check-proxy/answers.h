/* The last answers that were seen while the container was awake, by what was asked. */
#ifndef PROXY_ANSWERS_H
#define PROXY_ANSWERS_H

#include <stddef.h>
#include <stdint.h>

#include "bounds.h"

/* What was asked: protocol and question, bytes that only their own module understands. */
struct question {
	size_t length;
	unsigned char bytes[QUESTION_MAX];
};

struct answer {
	uint64_t used; /* when, in asks */
	size_t question_length, head_length, body_length;
	unsigned char bytes[]; /* one after the other */
};

struct answers {
	uint64_t asks;
	struct answer *kept[ANSWERS];
};

/* Adds to a question; one that gets too long loses its length, and is neither kept nor found. */
void question_add(struct question *question, const void *bytes, size_t length);

/* Keeps the answer in the place of an older one to the same question. */
void answers_keep(struct answers *answers, const struct question *question, const void *head,
		  size_t head_length, const void *body, size_t body_length);

/* The answer, or NULL; it is whole until the next call of answers_keep(). */
const struct answer *answers_find(struct answers *answers, const struct question *question);

static inline const unsigned char *answer_head(const struct answer *answer)
{
	return answer->bytes + answer->question_length;
}

static inline const unsigned char *answer_body(const struct answer *answer)
{
	return answer_head(answer) + answer->head_length;
}

#endif
