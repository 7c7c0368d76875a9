/** Random access to the bytes of one trace file, wherever it is. */
export interface Source {
  readonly name: string;
  readonly size: number;
  /** Numbers of weights that may be read before anybody looks at them; undefined: all. */
  readonly ahead?: number;
  /** Bytes `start` to `end`, the end excluded. */
  read(start: number, end: number): Promise<ArrayBuffer>;
}
