# make quickstart: train, distil and sample on MNIST.  make test: all checks.  Both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG := configs/quickstart.yaml
NEWEST = $$(ls output/quickstart/diffusion-*.pt | sort -V | tail -n 1)
RESULTS := output/distilled/quickstart
SMALL := configs/mnist_small.yaml
PROCESSES ?= 2
RANKS = OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=$(PROCESSES)
EVALUATE = $(RANKS) evaluate.py --output output/evaluation
PUBLISHED := pretrained/mnist-*.safetensors

.PHONY: help install quickstart results evaluate clean_ground evaluate_clean adversarial evaluate_adversarial by_class \
	experiments ablation methods networks pipeline gpu latency demo test test-slow test-demo torture lint format mutants \
	notebook lock clean

help:
	@echo 'make install      a virtual environment in .venv with all that is needed'
	@echo 'make quickstart   train, distil 1024 -> 1 and draw samples on MNIST (two CPU cores, minutes)'
	@echo 'make results      the published weights anew: train, distil 1024 -> 1, measure (hours)'
	@echo 'make evaluate     measure the published weights (hours)'
	@echo 'make clean_ground the published weights, trained on until their ground is black (hours; minutes on a GPU)'
	@echo 'make adversarial  their students, drawn towards the data as well (an hour or two)'
	@echo 'make by_class     the published weights that take class and guidance anew (an hour)'
	@echo 'make experiments  compare recipes for a teacher in equal CPU time (hours)'
	@echo 'make ablation     output types and loss weights on MNIST, as in the first table of the paper (hours)'
	@echo 'make methods      methods of distillation on one teacher in equal CPU time (hours)'
	@echo 'make networks     UNet, transformer and latent UNet, each with its ladder, in equal CPU time (hours)'
	@echo 'make pipeline     a diffusers pipeline trained by diffusers, distilled to one step (an hour)'
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

# On two CPU cores, two processes of one thread are faster than one of two. On GPUs: PROCESSES=<GPUs>.
results: $(VENV)/.installed
	$(RANKS) train.py --config_path $(SMALL)
	$(RANKS) distill.py --config_path $(SMALL) \
		--teacher_model_checkpoint $$(ls output/mnist_small/diffusion-*.pt | sort -V | tail -n 1)
	$(BIN)/python -m tools.publish --half --name mnist --output pretrained \
		--checkpoint $$(ls output/mnist_small/diffusion-*.pt | sort -V | tail -n 1) \
		$(foreach n,64 8 4 2 1,output/distilled/mnist_small/student-$(n).pt)
	$(MAKE) evaluate
	mkdir -p docs/mnist
	cp output/evaluation/results.* output/evaluation/distances.png output/distilled/mnist_small/comparison.png \
		docs/mnist/

# 2,000 images of each, as a distance falls with their number; 5,000 of few steps as well. Each call
# adds its rows to those of the ones before, and draws no image twice.
evaluate: $(VENV)/.installed
	$(EVALUATE) --checkpoint $(PUBLISHED) --steps 1024 --count 2000
	$(EVALUATE) --checkpoint pretrained/mnist-teacher.safetensors pretrained/mnist-[1248]-step*.safetensors \
		--steps 1 2 4 8 1024 --count 5000 --max_calls 2048000
	$(EVALUATE) --checkpoint pretrained/mnist-teacher.safetensors \
		--steps 1 2 4 8 16 32 64 128 1024 --count 2000
	$(EVALUATE) --checkpoint pretrained/mnist-teacher.safetensors --sampler dpm_solver++ \
		--steps 1 2 4 8 16 32 64 --count 2000
	$(EVALUATE) --checkpoint pretrained/mnist-teacher.safetensors --sampler ancestral \
		--steps 1 2 4 8 16 32 64 128 1024 --count 2000 --max_calls 1024000

# The published weights trained on with x_hat in [-1, 1]: their samples have a black ground. The students of 16 and 8
# steps begin anew, as their teacher, in a second ladder: those that began as the first weights' went on drawing like them.
# On one GPU: make clean_ground PROCESSES=1 ENGINE=engine.cuda_graphs=true; ENGINE=engine.precision=bf16 on
# processors that have it.
ENGINE ?= engine.precision=fp32
CLEAN = output/mnist_clean/diffusion-8000.pt
FIRST = output/distilled/mnist_clean
SECOND = output/distilled/mnist_clean_again
CLEAN_LADDER = $(RANKS) distill.py --config_path configs/mnist_clean.yaml --teacher_model_checkpoint $(CLEAN)
clean_ground: $(VENV)/.installed
	$(RANKS) train.py --config_path configs/mnist_clean.yaml --initialise pretrained/mnist-teacher.safetensors \
		--set $(ENGINE)
	$(CLEAN_LADDER) --set $(ENGINE) --initialise $(foreach n,8-steps 4-steps 2-steps 1-step,pretrained/mnist-$(n).safetensors)
	$(CLEAN_LADDER) --output $(SECOND) --set distillation.ladder=[64,16,8] distillation.updates_per_stage=[300,700] \
		$(ENGINE)
	$(BIN)/python -m tools.publish --half --name mnist --output pretrained/clean --checkpoint $(CLEAN) \
		$(SECOND)/student-8.pt $(foreach n,4 2 1,$(FIRST)/student-$(n).pt)
	$(MAKE) evaluate_clean

evaluate_clean: $(VENV)/.installed
	$(RANKS) evaluate.py --output output/clean_ground --checkpoint pretrained/clean/*.safetensors --steps 64 --count 5000
	mkdir -p docs/clean
	cp output/clean_ground/results.* output/clean_ground/distances.png docs/clean/

# The students of pretrained/clean, drawn towards the data by an adversarial term as well. Where a student stays what it
# is, and is there only as the next one's teacher, it gets a single update.
AS_WELL = output/distilled/adversarial
CLEAN_STUDENT = pretrained/clean/mnist-$(1).safetensors
ADVERSARIAL = $(RANKS) distill.py --teacher_model_checkpoint $(call CLEAN_STUDENT,teacher) --set \
	"distillation.losses={snr_trunc: 0.3, adversarial: 0.3}" distillation.batch_size=64 distillation.learning_rate=2.0e-4 \
	distillation.time_exponent=3.0 distillation.ema_decay=0.998 distillation.checkpoint_every=50 $(ENGINE)
adversarial: $(VENV)/.installed-dev
	$(ADVERSARIAL) distillation.ladder=[64,8,4,2,1] distillation.updates_per_stage=[1,1,500,800] \
		distillation.warmup=60 distillation.learning_rate=[1.0e-4,1.0e-4,2.0e-4,2.0e-4] --output $(AS_WELL) \
		--initialise $(foreach n,8-steps 4-steps 2-steps 1-step,$(call CLEAN_STUDENT,$(n)))
	$(ADVERSARIAL) distillation.ladder=[64,8,4] distillation.updates_per_stage=[1,800] \
		distillation.warmup=200 distillation.learning_rate=[1.0e-4,2.0e-4] --output $(AS_WELL)_4 \
		--initialise $(foreach n,8-steps 4-steps,$(call CLEAN_STUDENT,$(n)))
	$(BIN)/python -m tools.publish --half --name mnist --output pretrained/adversarial \
		--checkpoint $(AS_WELL)_4/student-4.pt $(AS_WELL)/student-2.pt $(AS_WELL)/student-1.pt
	$(MAKE) evaluate_adversarial
	$(BIN)/python -m tools.race --output docs/race.gif
	$(BIN)/python -m tools.export_demo

evaluate_adversarial: $(VENV)/.installed
	$(RANKS) evaluate.py --output output/adversarial --checkpoint $(call CLEAN_STUDENT,teacher) \
		pretrained/adversarial/*.safetensors --steps 64 --count 5000
	mkdir -p docs/adversarial
	cp output/adversarial/results.* output/adversarial/distances.png docs/adversarial/

# A teacher that knows the classes, and its students that take the guidance weight as an input.
BY_CLASS = output/mnist_conditional/diffusion-4000.pt
by_class: $(VENV)/.installed-dev
	$(RANKS) train.py --config_path configs/mnist_conditional.yaml --set training.updates=4000 engine.precision=bf16
	$(RANKS) distill.py --config_path configs/mnist_guided.yaml --teacher_model_checkpoint $(BY_CLASS) \
		--set engine.precision=bf16
	$(BIN)/python -m tools.publish --half --name mnist --output pretrained/by_class --checkpoint $(BY_CLASS) \
		output/distilled/mnist_guided/student-[18].pt
	$(RANKS) evaluate.py --checkpoint pretrained/by_class/*.safetensors --steps 64 --guidance 0 1 2 --count 1000 \
		--output output/by_class
	$(BIN)/python -m tools.export_demo

experiments: $(VENV)/.installed
	$(BIN)/python -m benchmarks.sweep experiments

# Two processes share the variants; the second call trains the best ones once more.
SWEEP = $(BIN)/python -m benchmarks.sweep
ablation: $(VENV)/.installed
	$(SWEEP) ablation & $(SWEEP) ablation; wait
	$(SWEEP) ablation & $(SWEEP) ablation; wait
	$(SWEEP) ablation --table

methods: $(VENV)/.installed
	$(SWEEP) methods & $(SWEEP) methods; wait
	$(SWEEP) methods --table

networks: $(VENV)/.installed-dev
	$(BIN)/python -m tools.train_autoencoder --config_path configs/mnist_autoencoder.yaml
	$(SWEEP) networks & $(SWEEP) networks; wait
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
	$(BIN)/python -m benchmarks.latency > docs/latency.part
	mv docs/latency.part docs/latency.md
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
	$(BIN)/python -m pytest -rs -m 'not slow' --numprocesses auto --maxprocesses 8 --dist loadscope

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

test-demo: $(VENV)/.installed-dev
	@{ command -v chromium && command -v chromedriver; } > /dev/null \
		|| { apt-get update && apt-get install -y chromium chromium-driver; } \
		|| { echo 'error: no chromium and chromedriver, and apt-get cannot install them'; exit 2; }
	$(BIN)/python -m pytest -s tests/test_demo.py

torture: $(VENV)/.installed-dev
	KILLS=200 DAMAGED=1000 HOSTILE=200 CONFIG_EXAMPLES=10000 $(BIN)/python -m pytest -s tests/test_kills.py \
		tests/test_hostile.py tests/test_configs.py

mutants: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutants

notebook: $(VENV)/.installed-dev
	$(BIN)/python -m tests.notebook

lock: $(VENV)/.installed-dev
	{ echo '# The exact versions that the tests last passed with, written by make lock. To install them:'; \
		echo '# python -m pip install --requirement requirements.lock'; \
		$(BIN)/python -m pip list --format=freeze --exclude pip --exclude-editable | LC_ALL=C sort -f; } \
		> requirements.lock.new
	mv requirements.lock.new requirements.lock

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
