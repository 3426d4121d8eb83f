/* The last answers, a bounded table for each mapping.
 *
 * Why it exists: while the container sleeps nobody else can say how it was. A failure is kept like any
 * answer, so that what was unhealthy when last seen is not told to be healthy.
 *
 * Called by http1.c and grpc.c.
 */
#include "answers.h"

#include <stdlib.h>
#include <string.h>

#include "say.h"

enum { TOO_LONG = QUESTION_MAX + 1 };

void question_add(struct question *question, const void *bytes, size_t length)
{
	if (question->length == TOO_LONG || length > QUESTION_MAX - question->length) {
		question->length = TOO_LONG;
		return;
	}
	if (length)
		memcpy(question->bytes + question->length, bytes, length);
	question->length += length;
}

static int is_to(const struct answer *answer, const struct question *question)
{
	return answer && answer->question_length == question->length &&
	       !memcmp(answer->bytes, question->bytes, question->length);
}

/* Where the question's answer is, or the place for it. */
static struct answer **place(struct answers *answers, const struct question *question)
{
	struct answer **oldest = &answers->kept[0];

	for (int i = 0; i < ANSWERS; i++) {
		struct answer **here = &answers->kept[i];

		if (is_to(*here, question))
			return here;
		if (*oldest && (!*here || (*here)->used < (*oldest)->used))
			oldest = here;
	}
	return oldest;
}

void answers_keep(struct answers *answers, const struct question *question, const void *head,
		  size_t head_length, const void *body, size_t body_length)
{
	struct answer **here, *new;

	if (question->length == TOO_LONG)
		return;
	here = place(answers, question);
	new = allocate(*here, sizeof *new + question->length + head_length + body_length);
	*here = new;
	new->used = ++answers->asks;
	new->question_length = question->length;
	new->head_length = head_length;
	new->body_length = body_length;
	memcpy(new->bytes, question->bytes, question->length);
	memcpy(new->bytes + question->length, head, head_length);
	if (body_length)
		memcpy(new->bytes + question->length + head_length, body, body_length);
}

const struct answer *answers_find(struct answers *answers, const struct question *question)
{
	struct answer *found;

	if (question->length == TOO_LONG)
		return NULL;
	found = *place(answers, question);
	if (!is_to(found, question))
		return NULL;
	found->used = ++answers->asks;
	return found;
}
