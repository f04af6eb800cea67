# The targets for a GPU that is there for minutes (benchmarks/gpu_plan.py); the Makefile includes this. MINUTES: of each. OUT: where its
# two files go. REHEARSE=1: without a GPU.
.PHONY: gpu-prepare gpu-correct gpu-tables gpu-model gpu-tune

MINUTES ?= 9
gpu-prepare:
	$(PY) benchmarks/gpu_plan.py prepare

gpu-correct gpu-tables gpu-model gpu-tune:
	$(PY) benchmarks/gpu_plan.py $(@:gpu-%=%) --minutes $(MINUTES) --out $(OUT) $(if $(REHEARSE),--rehearse)
