# The targets for a machine with a GPU; the Makefile includes this.
.PHONY: gpu-check gpu-doctor gpu-test gpu-ctest gpu-sanitize gpu-bench gpu-tune

# Every part is run and logged, whatever became of the ones before.
gpu-check: export FPET_CUDA := 1
gpu-check: $(READY)
	@status=0; for part in doctor test ctest sanitize bench; do \
	  $(MAKE) --no-print-directory gpu-$$part || { status=1; echo "!!! gpu-$$part FAILED !!!" >&2; }; done; exit $$status

gpu-doctor: $(READY)
	@mkdir -p $(OUT)
	$(PY) -m fpet_kernels | tee $(OUT)/gpu-doctor.txt

# Triton compiles hundreds of kernels: on many cores at once, where pytest-xdist is.
PARALLEL = $(shell $(PY) -c 'import xdist; print("-n 8")' 2> /dev/null)
gpu-test: $(READY)
	@mkdir -p $(OUT)
	FPET_REQUIRE_BACKENDS=cuda,triton,cpu $(PY) -m pytest -q $(PARALLEL) 2>&1 | tee $(OUT)/gpu-tests.txt

gpu-ctest: $(READY)
	@mkdir -p $(OUT)
	{ $(call run_ctest,build/gpu,-DCMAKE_BUILD_TYPE=Release -DFPET_CUDA=ON) && build/gpu/example_merge; } 2>&1 | tee $(OUT)/gpu-ctest.txt

SANITIZER := $(firstword $(shell type -P compute-sanitizer) $(wildcard /usr/local/cuda/bin/compute-sanitizer))
SANITIZE_TIMEOUT ?= 180

# Not every virtual machine lets it at the GPU; then this says so, and is no failure.
gpu-sanitize: gpu-ctest
	@if [[ -z "$(SANITIZER)" ]]; then echo '!!! NOT CHECKED: compute-sanitizer is not installed here. !!!' >&2; exit 0; fi; \
	status=0; for tool in memcheck racecheck initcheck; do for test in test_cuda_forward test_cuda_backward; do \
	  log=$(OUT)/gpu-$$tool-$$test.txt; echo "$$tool $$test"; \
	  timeout $(SANITIZE_TIMEOUT) $(SANITIZER) --tool $$tool --error-exitcode 9 build/gpu/$$test &> $$log && code=0 || code=$$?; tail -n 2 $$log; \
	  if grep -q 'Device not supported' $$log; then echo "!!! NOT CHECKED: $$tool does not support this device here. !!!" >&2; \
	  elif [[ $$code == 124 ]]; then echo "!!! NOT FINISHED: $$tool $$test took over $(SANITIZE_TIMEOUT) s. !!!" >&2; \
	  elif [[ $$code != 0 ]]; then status=1; fi; done; done; exit $$status

gpu-bench: $(READY)
	@mkdir -p $(OUT)
	$(PY) benchmarks/kernel_vs_ref.py --device cuda --out $(OUT)/kernel_vs_ref-cuda.jsonl $(BENCH_ARGS) 2>&1 | tee $(OUT)/gpu-bench.txt

# Triton's configurations for this GPU, as rows for fpet_kernels/triton/configs.py.
gpu-tune: $(READY)
	@mkdir -p $(OUT)
	$(PY) benchmarks/tune.py --device cuda --out $(OUT)/tune-cuda.txt
