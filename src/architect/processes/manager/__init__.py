"""architect-manager: the webhooks that check and complete pods before the API server stores them."""
