/** What the bundler makes elements with. */
export { createElement, Fragment } from "preact";
