/* libnftables.so.1, as far as CRIU asks for it: gnutls.c says why.
 *
 * A context cannot be had, which CRIU takes for a machine without nftables; nothing else is called then. */

void *nft_ctx_new(unsigned int flags)
{
	(void)flags;
	return 0;
}

int nft_ctx_buffer_error(void)
{
	return -1;
}

int nft_ctx_buffer_output(void)
{
	return -1;
}

void nft_ctx_free(void)
{
}

const char *nft_ctx_get_error_buffer(void)
{
	return "architect's CRIU has no nftables";
}

void *nft_ctx_set_error(void)
{
	return 0;
}

void *nft_ctx_set_output(void)
{
	return 0;
}

int nft_run_cmd_from_buffer(void)
{
	return -1;
}
