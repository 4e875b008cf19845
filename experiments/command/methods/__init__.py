"""New methods: written from templates, and checked on a tiny model."""
