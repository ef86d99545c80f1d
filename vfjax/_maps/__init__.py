"""A linear map per model and group: what matchers return and merging applies."""
