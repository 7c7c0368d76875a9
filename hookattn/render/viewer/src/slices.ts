/** Long work in slices, so that the page never freezes: `await slices.turn()` now and then gives way to the browser. */
export class Slices {
  private began = performance.now();

  /** `budget`: milliseconds of work between two breaths. */
  constructor(
    private readonly budget = 10,
    private readonly signal?: AbortSignal,
  ) {}

  async turn(): Promise<void> {
    this.signal?.throwIfAborted();
    if (performance.now() - this.began < this.budget) return;
    await breath();
    this.signal?.throwIfAborted();
    this.began = performance.now();
  }
}

/** Resolves after the browser had its turn; not slowed down in nested use as setTimeout is. */
function breath(): Promise<void> {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      channel.port1.close();
      resolve();
    };
    channel.port2.postMessage(null);
  });
}
