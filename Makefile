# Every target sets up what it needs: a virtual environment and the package in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits
# glibc on Linux: huge pages for the large temporary arrays of a step; a third faster on CPU here.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart photos emoji test test-slow lint clean

quickstart: $(VENV)/installed
	$(BIN)/enat train --config=configs/digits.py --workdir=$(WORKDIR)
	$(BIN)/enat sample --workdir=$(WORKDIR) --out=$(WORKDIR)/digits.png
	$(BIN)/enat evaluate --workdir=$(WORKDIR) --config.evaluate.metrics=digits \
		--config.evaluate.num_images=1000

photos: $(VENV)/installed
	$(BIN)/enat train_tokenizer --config=configs/photos_tokenizer.py --workdir=runs/photos_tokenizer
	$(BIN)/enat tokenize --config=configs/photos.py --check=runs/photos_records.png
	$(BIN)/enat train --config=configs/photos.py --workdir=runs/photos
	$(BIN)/enat sample --workdir=runs/photos --out=runs/photos/photos.png

emoji: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[emoji]"
	$(BIN)/enat train_tokenizer --config=configs/emoji_tokenizer.py --workdir=runs/emoji_tokenizer
	$(BIN)/enat tokenize --config=configs/emoji.py --batch_size=256
	$(BIN)/enat train --config=configs/emoji.py --workdir=runs/emoji
	$(BIN)/enat evaluate --workdir=runs/emoji --out=runs/emoji/held_out.json \
		--config.evaluate.metrics=emoji --config.evaluate.num_images=496 \
		--config.images.split=held_out
	$(BIN)/python docs/draw_emoji.py runs/emoji runs/emoji/held_out.png

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) data runs
