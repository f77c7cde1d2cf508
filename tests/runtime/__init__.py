"""Tests of gaf_ddp/runtime."""
