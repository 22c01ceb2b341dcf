# make quickstart: train, distil and sample on MNIST.  make test: style, types and tests.  Both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG := configs/quickstart.yaml
NEWEST = $$(ls output/quickstart/diffusion-*.pt | sort -V | tail -n 1)
RESULTS := output/distilled/quickstart
PROCESSES ?= 2
RANKS = OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=$(PROCESSES)
EVALUATE = $(RANKS) evaluate.py --output output/published

.PHONY: help install quickstart results tract adversarial half_width evaluate by_class \
	experiments ablation methods networks pipeline gpu latency demo test test-slow test-demo torture lint format mutants \
	notebook lock clean

help:
	@echo 'make install      a virtual environment in .venv with all that is needed'
	@echo 'make quickstart   train, distil 1024 -> 1 and draw samples on MNIST (two CPU cores, minutes)'
	@echo 'make results      a teacher and its students from nothing: train, distil, measure (eight hours, in bfloat16)'
	@echo 'make tract        a part of it: students of 8, 4, 2 and 1 steps by TRACT (hours)'
	@echo 'make adversarial  a part of it, after those before it: students trained adversarially as well (an hour)'
	@echo 'make half_width   a part of it, after make tract: students with half the channels (an hour)'
	@echo 'make evaluate     a part of it: measure the published weights, anew into docs/mnist (an hour or two)'
	@echo 'make by_class     the published weights that take class and guidance anew (an hour, in bfloat16)'
	@echo 'make experiments  compare recipes for a teacher in equal CPU time (hours)'
	@echo 'make ablation     output types and loss weights on MNIST, as in the first table of the paper (an hour and a half)'
	@echo 'make methods      methods of distillation on one teacher in equal CPU time (hours)'
	@echo 'make networks     UNet, transformer and latent UNet, each with its ladder, in equal CPU time (hours)'
	@echo 'make pipeline     a diffusers pipeline trained by diffusers, distilled to one step (an hour and a half)'
	@echo 'make latency      milliseconds an image by model and batch, in PyTorch, ONNX and a browser (minutes)'
	@echo 'make demo         serve the page in docs/demo: the models in your browser (needs no installation)'
	@echo 'make gpu          tests and speed on a GPU (about ten minutes; DEVICE=cpu SMALL=1 tries it out)'
	@echo 'make test         lint, types and tests'
	@echo 'make test-slow    the tests that take minutes'
	@echo 'make test-demo    the page in a browser; installs Chromium where apt-get can'
	@echo 'make torture      200 kills, 1,000 damaged files, 200 hostile ones, 10,000 configs (about half an hour)'
	@echo 'make mutants      break the formulas on purpose and see the tests fail'
	@echo 'make notebook     run docs/first_steps.ipynb and store what it prints and draws (a minute)'
	@echo 'make lock         write the installed versions to requirements.lock'
	@echo 'make format       format the code'
	@echo 'make clean        delete the virtual environment and the caches; results in output/ stay'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $(VENV)/.installed $@

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/python train.py --config_path $(CONFIG)
	$(BIN)/python distill.py --config_path $(CONFIG) --teacher_model_checkpoint $(NEWEST)
	$(BIN)/python sample.py --checkpoint $(RESULTS)/student-8.pt --trajectory
	@echo
	@echo 'look at $(RESULTS)/comparison.png and ladder.png; the table is in ladder.md beside them'

# A teacher and its students from nothing, into pretrained/ and docs/mnist/ in place of the published ones (as each of
# its parts does). A second call goes on where a stop left off. On two CPU cores, two processes of one thread are faster
# than one of two. On processors that have it: ENGINE="engine.precision=bf16 engine.compile=true". On one GPU:
# PROCESSES=1 ENGINE=engine.cuda_graphs=true; on several: PROCESSES=<GPUs>.
ENGINE ?= engine.precision=fp32
CLEAN = configs/mnist_clean.yaml
TEACHER = output/mnist_clean/diffusion-16000.pt
LADDER = output/distilled/mnist_clean
HALF = output/distilled/mnist_half_width
PUBLISHED = pretrained/mnist-$(1).safetensors
PUBLISH = $(BIN)/python -m tools.publish --half --output pretrained --checkpoint
results: $(VENV)/.installed-dev
	$(RANKS) train.py --config_path configs/mnist_small.yaml --set $(ENGINE)
	$(RANKS) train.py --config_path $(CLEAN) --initialise output/mnist_small/diffusion-18000.pt --set $(ENGINE)
	$(RANKS) distill.py --config_path $(CLEAN) --teacher_model_checkpoint $(TEACHER) --set $(ENGINE)
	$(PUBLISH) $(TEACHER) $(foreach n,8 4 2 1,$(LADDER)/student-$(n).pt) --name mnist
	$(MAKE) tract
	$(MAKE) adversarial
	$(MAKE) half_width
	$(MAKE) evaluate

# Students of 8, 4 and 2 steps straight from the teacher, each with the weights of the one before to begin with, and
# one of a single step from that of 2, with the pseudo-Huber loss.
TRACT = output/distilled/mnist_tract
OF_TRACT = $(RANKS) distill.py --config_path configs/mnist_tract.yaml --output $(TRACT)_$(1) --set $(ENGINE)
OF_BASE = --teacher_model_checkpoint $(call PUBLISHED,teacher)
GRID_8 = distillation.grid=[1.0,0.9296875,0.859375,0.78125,0.6875,0.5703125,0.4140625,0.21875,0.0]
GRID_4 = distillation.grid=[1.0,0.8515625,0.6875,0.4375,0.0]
tract: $(VENV)/.installed-dev
	$(call OF_TRACT,8) $(GRID_8) $(OF_BASE)
	$(call OF_TRACT,4) $(GRID_4) distillation.ladder=[128,4] distillation.updates_per_stage=10000 $(OF_BASE) \
		--initialise $(TRACT)_8/student-8.pt
	$(call OF_TRACT,2) distillation.ladder=[128,2] distillation.updates_per_stage=8000 $(OF_BASE) \
		--initialise $(TRACT)_4/student-4.pt
	$(call OF_TRACT,1) distillation.ladder=[2,1] distillation.method=progressive distillation.updates_per_stage=16000 \
		"distillation.losses={pseudo_huber: 1.0}" --teacher_model_checkpoint $(TRACT)_2/student-2.pt
	$(PUBLISH) $(foreach n,8 4 2 1,$(TRACT)_$(n)/student-$(n).pt) --name mnist-tract

# Students trained with an adversarial term as well: those of 8, 4 and 2 steps of TRACT (run make tract before), kept
# close to their teacher, and more freely those of 2 and 1 steps of the ladder, of which the last is published.
AS_WELL = output/distilled/adversarial
CLOSE = $(RANKS) distill.py $(OF_BASE) --initialise $(TRACT)_$(1)/student-$(1).pt --output $(AS_WELL)_$(1) \
	--set $(ENGINE) distillation.method=tract distillation.ladder=[128,$(1)] distillation.updates_per_stage=1500 \
	distillation.batch_size=32 distillation.learning_rate=1.0e-4 distillation.time_exponent=2.0 \
	distillation.ema_decay=0.998 distillation.warmup=100 distillation.checkpoint_every=100 \
	"distillation.losses={snr_trunc: 3.0, adversarial: 0.3}"
FREE = $(RANKS) distill.py --set $(ENGINE) "distillation.losses={snr_trunc: 0.3, adversarial: 0.3}" \
	distillation.batch_size=64 distillation.time_exponent=3.0 distillation.ema_decay=0.998 distillation.warmup=60 \
	distillation.checkpoint_every=50
adversarial: $(VENV)/.installed-dev
	$(call CLOSE,8) $(GRID_8)
	$(call CLOSE,4) $(GRID_4)
	$(call CLOSE,2) distillation.grid=adaptive
	$(FREE) distillation.ladder=[4,2,1] distillation.updates_per_stage=[500,800] --output $(AS_WELL)_1 \
		--teacher_model_checkpoint $(LADDER)/student-4.pt --initialise $(LADDER)/student-2.pt $(LADDER)/student-1.pt
	$(PUBLISH) $(foreach n,8 4 2 1,$(AS_WELL)_$(n)/student-$(n).pt) --name mnist-adversarial

# Students with half the channels: distilled from TRACT's of 8 steps; that of one step with the adversarial term as well.
half_width: $(VENV)/.installed-dev
	$(RANKS) distill.py --config_path configs/mnist_half_width.yaml \
		--teacher_model_checkpoint $(TRACT)_8/student-8.pt --set $(ENGINE)
	$(FREE) distillation.ladder=[2,1] distillation.updates_per_stage=1200 distillation.learning_rate=3.0e-4 \
		--output $(HALF)_1 --teacher_model_checkpoint $(HALF)/student-2.pt --initialise $(HALF)/student-1.pt
	$(PUBLISH) $(HALF)/student-8.pt $(HALF)_1/student-1.pt --name mnist-half-width

# 10,000 images of each and 5,000, as a distance falls with their number; of 2,000, also other samplers and numbers of
# steps. Each call adds its rows to those of the ones before, and draws no image twice.
MEASURED = $(call PUBLISHED,teacher) $(wildcard pretrained/mnist-[1248]-step*.safetensors \
	pretrained/mnist-tract-*.safetensors pretrained/mnist-adversarial-*.safetensors \
	pretrained/mnist-half-width-*.safetensors)
evaluate: $(VENV)/.installed-dev
	$(EVALUATE) --checkpoint $(MEASURED) --steps 64 --count 10000
	$(EVALUATE) --checkpoint $(MEASURED) --steps 64 128 --count 5000
	$(EVALUATE) --checkpoint $(MEASURED) --steps 1 2 4 8 16 32 50 64 100 128 --count 2000
	$(EVALUATE) --checkpoint $(call PUBLISHED,teacher) --sampler dpm_solver++ \
		--steps 1 2 4 8 10 16 20 32 --count 2000
	$(EVALUATE) --checkpoint $(call PUBLISHED,teacher) --sampler ancestral \
		--steps 1 2 4 8 16 32 64 128 1024 --count 2000
	mkdir -p docs/mnist
	cp output/published/results.* output/published/distances.png docs/mnist/
	$(BIN)/python -m tools.race --output docs/race.gif
	$(BIN)/python -m tools.export_demo

# A teacher that knows the classes, and its students that take the guidance weight as an input.
BY_CLASS = output/mnist_conditional/diffusion-14000.pt
by_class: $(VENV)/.installed-dev
	$(RANKS) train.py --config_path configs/mnist_conditional.yaml --set $(ENGINE)
	$(RANKS) distill.py --config_path configs/mnist_guided.yaml --teacher_model_checkpoint $(BY_CLASS) --set $(ENGINE)
	$(PUBLISH) $(BY_CLASS) output/distilled/mnist_guided/student-[18].pt --name mnist-by-class
	$(RANKS) evaluate.py --checkpoint pretrained/mnist-by-class-*.safetensors --steps 64 --guidance 0 1 2 --count 1000 \
		--output output/by_class
	$(BIN)/python -m tools.export_demo

experiments: $(VENV)/.installed
	$(BIN)/python -m benchmarks.sweep experiments

# Two processes share the variants; the second call trains the best ones once more.
SWEEP = $(BIN)/python -m benchmarks.sweep
TWICE = $(1) & $(1); first=$$?; wait $$! && exit $$first
ablation: $(VENV)/.installed
	$(call TWICE,$(SWEEP) ablation)
	$(call TWICE,$(SWEEP) ablation)
	$(SWEEP) ablation --table

methods: $(VENV)/.installed
	$(call TWICE,$(SWEEP) methods)
	$(SWEEP) methods --table

networks: $(VENV)/.installed-dev
	$(BIN)/python -m tools.train_autoencoder --config_path configs/mnist_autoencoder.yaml
	$(call TWICE,$(SWEEP) networks)
	$(SWEEP) networks --table

# A pipeline that the diffusers library trains, and the students that this project makes of it.
PIPELINE = output/pipeline
pipeline: $(VENV)/.installed-dev
	test -e $(PIPELINE) || $(BIN)/python -m benchmarks.diffusers_pipeline --output $(PIPELINE)
	$(BIN)/python -m tools.import_diffusers $(PIPELINE) --output $(PIPELINE).safetensors --set data.name=mnist
	$(RANKS) distill.py --teacher_model_checkpoint $(PIPELINE).safetensors --output output/distilled/pipeline --set \
		distillation.updates_per_stage=[400,100,100,150,200,300,300] distillation.batch_size=32 \
		distillation.learning_rate=2.0e-4
	$(RANKS) evaluate.py --checkpoint $(PIPELINE).safetensors output/distilled/pipeline/student-125.pt \
		output/distilled/pipeline/student-25.pt output/distilled/pipeline/student-[15].pt --steps 125 25 5 1 \
		--count 1000 --output output/pipeline-evaluation

# On a rented machine with a GPU, in about ten minutes; as a test of itself: DEVICE=cpu SMALL=1
DEVICE ?= cuda
gpu: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu --device $(DEVICE) $(if $(SMALL),--small --output output/gpu-small)

latency: $(VENV)/.installed-dev
	mkdir -p output
	$(BIN)/python -m benchmarks.latency > output/latency.md
	mv output/latency.md docs/latency.md
	@echo 'written: docs/latency.md'

# Any static web server will do; this one is part of Python.
PORT ?= 8000
demo:
	@echo 'open http://127.0.0.1:$(PORT)/ (Ctrl-C stops; another port: make demo PORT=8001)'
	@$(PYTHON) -m http.server $(PORT) --bind 127.0.0.1 --directory docs/demo

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -rs -m 'not slow' --numprocesses auto --maxprocesses 8 --dist loadscope --max-worker-restart 0

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=1800

test-demo: $(VENV)/.installed-dev
	@{ command -v chromium && command -v chromedriver; } > /dev/null \
		|| { apt-get update && apt-get install -y chromium chromium-driver; } \
		|| { echo 'error: no chromium and chromedriver, and apt-get cannot install them'; exit 2; }
	$(BIN)/python -m pytest -s tests/test_demo.py

torture: $(VENV)/.installed-dev
	KILLS=200 DAMAGED=1000 HOSTILE=200 CONFIG_EXAMPLES=10000 $(BIN)/python -m pytest -s tests/test_hostile.py \
		tests/test_configs.py -o faulthandler_timeout=3600

mutants: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutants

notebook: $(VENV)/.installed-dev
	$(BIN)/python -m tests.notebook

lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip list --format=freeze --exclude pip --exclude-editable > requirements.lock.new
	{ echo '# The exact versions that the tests last passed with, written by make lock. To install them:'; \
		echo '# python -m pip install --requirement requirements.lock'; \
		LC_ALL=C sort -f requirements.lock.new; } > requirements.lock
	rm requirements.lock.new

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
