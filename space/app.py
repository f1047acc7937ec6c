"""The app of `peft-bsr app` as a Hugging Face Space, listening on the address that Spaces forward."""

from peft_bsr.app.serving import serve

if __name__ == "__main__":
    serve("0.0.0.0").block_thread()
