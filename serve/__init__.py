"""The endpoint: `serve run serve.app:build bundle=PATH`."""
